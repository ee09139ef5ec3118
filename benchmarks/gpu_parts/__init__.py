"""The parts of `python -m benchmarks.gpu`, each a process of its own."""
