"""What the stored curves say: frontiers and the best structure for a budget."""

from nas.analysis.best import Answer, best_for_budget
from nas.analysis.frontier import Frontier, frontier
from nas.analysis.predict import predict_for_budget

__all__ = ["Answer", "Frontier", "best_for_budget", "frontier", "predict_for_budget"]
