"""Measurements of speed and size; ``make bench`` runs them. Not part of the package that users install."""
