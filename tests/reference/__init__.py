"""Slow loops written from the paper, one statement per symbol."""
