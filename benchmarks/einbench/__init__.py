"""Collecting and checking EinBench, the table of learning curves in `nas.einbench`."""
