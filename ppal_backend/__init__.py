"""PPAL for Label Studio: an ML backend that retrains a detector and orders the labeling queue by PPAL."""

__version__ = "0.1.0"
