"""Category Conditioned Matching Similarity (Eq. 6 and 7): packed objects, tiles of one class, images as a matrix."""

from ppal_backend.acquisition.ccms.matrix import LazySimilarity, MakeSimilarity, Similarity, similarity_matrix

__all__ = ["LazySimilarity", "MakeSimilarity", "Similarity", "similarity_matrix"]
