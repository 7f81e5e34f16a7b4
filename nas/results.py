"""The public name of `nas.records.answers`."""

from nas.records.answers import Answer, Candidate, FrontierAnswer, Multiplier, Point, Rival

__all__ = ["Answer", "Candidate", "FrontierAnswer", "Multiplier", "Point", "Rival"]
