"""The pages under ``/ui``: what the model knows, what it wants labelled next and why, what the machine does now."""
