"""One file per step: ``NNNN_what_changes.py``, each naming the one before it."""
