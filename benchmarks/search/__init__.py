"""Simulated searches on EinBench: what each way to search finds, as a function of its compute."""
