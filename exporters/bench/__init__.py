"""Latency of any artefact in any runtime, in worker processes, with hard gates and paired verdicts."""
