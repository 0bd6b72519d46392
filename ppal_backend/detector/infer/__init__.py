"""What a trained detector is used for: the pool, evaluation, and files for other programs."""
