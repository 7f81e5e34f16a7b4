"""Faults on purpose, and what must hold after them; full size: `python -m benchmarks.faults`."""
