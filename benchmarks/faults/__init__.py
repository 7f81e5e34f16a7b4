"""Faults on purpose, and what must hold after them; `python -m benchmarks.faults` runs them all."""
