"""Groups of ``ppal`` commands, and what all of them share."""
