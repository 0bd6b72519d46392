"""What tells two versions of a detector of the zoo apart."""

from __future__ import annotations

import hashlib
import json
import re

from ppal_backend.detector.config import read_config
from ppal_backend.detector.zoo import ZooEntry

_INHERITS = re.compile(rb"^_base_\b|\bread_base\b", re.MULTILINE)


def detector_fingerprint(entry: ZooEntry) -> str:
    """Hex digest of what a training of this detector depends on, so that results of two versions are never mixed."""
    digest = hashlib.sha256(f"{entry.schedule} {entry.input_size}".encode())
    text = entry.config.read_bytes()
    digest.update(text)
    if _INHERITS.search(text):
        whole = read_config(entry.config).to_dict()
        named = json.dumps(whole, sort_keys=True, default=lambda value: getattr(value, "__qualname__", str(value)))
        digest.update(named.encode())
    weights = entry.weights
    if weights is not None:
        digest.update(f"{weights.kind} {weights.url} {weights.sha256}".encode())
        if weights.path is not None and weights.path.is_file():
            digest.update(weights.path.read_bytes())
    return digest.hexdigest()
