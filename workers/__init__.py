"""Workers: the lease loop and the Ray Tune runner. The only place that imports ray."""
