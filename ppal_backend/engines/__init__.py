"""Where training and inference run."""
