"""Proposing candidates. The only place that imports optuna."""

from nas.search.propose import PastTrial, Proposal, propose

__all__ = ["PastTrial", "Proposal", "propose"]
