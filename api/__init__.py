"""REST service and dashboard. Imports neither torch nor ray nor optuna."""
