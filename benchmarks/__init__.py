"""Benchmarks: each one command, ratios of two things measured in one run, JSON and a table."""
