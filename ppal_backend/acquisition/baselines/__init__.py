"""Algorithms of other papers that PPAL is compared with, one file each: their scorers, selectors and comparisons."""
