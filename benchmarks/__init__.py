"""Figures by hand: each module measures one part and writes its table to benchmarks/results."""
