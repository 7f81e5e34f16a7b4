"""Public names of `nas.designs.theta`."""

from nas.designs.theta import AXES, DENSE, Theta

__all__ = ["AXES", "DENSE", "Theta"]
