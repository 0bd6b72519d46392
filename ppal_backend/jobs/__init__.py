"""Queued work: what is done about events, and which round runs when."""
