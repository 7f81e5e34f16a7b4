"""Tasks: data, model family, metric and recipe."""
