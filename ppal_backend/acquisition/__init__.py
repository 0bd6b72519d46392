"""Choosing images for labeling: arrays in, ids out. No I/O, clock, environment or global random state."""

from ppal_backend.acquisition.ccms import LazySimilarity, similarity_matrix
from ppal_backend.acquisition.clustering import k_center_greedy, k_medoids
from ppal_backend.acquisition.difficulty import DifficultyEMA, difficulty_coefficients, training_difficulty
from ppal_backend.acquisition.strategies import get_strategy, strategy_names
from ppal_backend.acquisition.uncertainty import image_uncertainty

__all__ = [
    "DifficultyEMA",
    "LazySimilarity",
    "difficulty_coefficients",
    "get_strategy",
    "image_uncertainty",
    "k_center_greedy",
    "k_medoids",
    "similarity_matrix",
    "strategy_names",
    "training_difficulty",
]
