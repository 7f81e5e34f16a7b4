"""Faults on purpose, and what must hold after them; full size: `benchmarks.service.faults`."""
