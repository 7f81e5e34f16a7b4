"""Searches on Ray clusters of several nodes; `python -m` runs them all."""
