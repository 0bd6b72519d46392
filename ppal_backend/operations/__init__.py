"""What operators do to a project or to the whole state, beside its rounds: go back, prune, back up, restore."""
