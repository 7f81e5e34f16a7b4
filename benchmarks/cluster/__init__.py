"""Searches on Ray clusters of several nodes; `python -m benchmarks.cluster` runs them all."""
