"""Everything that knows Label Studio: its API, its label configs, its predictions and its queue."""
