"""Training a detector of the zoo, resumable to the step."""
