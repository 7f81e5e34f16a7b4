"""What one GPU shows in a few minutes, from a plain checkout: `python -m benchmarks.gpu`."""
