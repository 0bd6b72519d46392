"""Detectors: the one package that imports mmengine, mmcv and mmdet.

``zoo`` reads the model zoo and imports nothing heavy; ``training``, ``evaluation`` and ``inference`` do.
"""
