"""What an unchanged detector said of an unchanged image in an earlier round is not asked again.

A step that looks at images notes which detector it was (:func:`fingerprint_of`), and with every image a stamp of its
file (:func:`stamp_of`). A later round of the same detector takes over the shards of the earlier one (hard links) and
looks at images alone whose stamp is new.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from ppal_backend.acquisition.strategies import READS_COUNTS
from ppal_backend.files import numbered_before, sha256_of
from ppal_backend.rounds.detections_store import link_shards, shards_of
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import PoolEntry
from ppal_backend.structures.round import ModelRef, RoundSpec

log = logging.getLogger(__name__)

FINGERPRINTS = "fingerprints"
"""In the facts of the step ``infer``: the detector's fingerprint by the folder that holds what it said."""


def fingerprint_of(spec: RoundSpec, model: ModelRef, keep_boxes: bool) -> str:
    """Tells apart whatever would say something else of the same image; "" where the weights are not a file."""
    weights = Path(model.checkpoint)
    if not weights.is_file():
        return ""
    counts = spec.strategy in READS_COUNTS
    told = [model.detector, model.labels, spec.embedding, spec.levels, counts, keep_boxes, sha256_of(weights)]
    return hashlib.blake2s(json.dumps(told).encode(), digest_size=16).hexdigest()


def stamp_of(entry: PoolEntry) -> int:
    """Tells an image's file from another one and from the same one changed; > 0.

    By its checksum where that is known, else by size and time.
    """
    content = entry.checksum
    if not content:
        try:
            status = Path(entry.path).stat()
        except OSError:
            return _stamp(entry, "not there")
        content = f"{status.st_size} {status.st_mtime_ns}"
    return _stamp(entry, content)


def _stamp(entry: PoolEntry, content: str) -> int:
    told = f"{entry.path}\n{entry.width} {entry.height}\n{content}"
    return (int.from_bytes(hashlib.blake2s(told.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1) + 1


def take_over(folder: RoundFolder, name: str, fingerprint: str) -> int | None:
    """Put what the newest earlier round of the same detector has into ``folder / name``, unless something is there.

    Args:
        folder: The round's folder; those of earlier rounds lie beside it.
        name: ``detections`` or ``labelled_detections``.
        fingerprint: Of the detector.

    Returns:
        The number of that round; None where there is none or nothing was to be done.
    """
    if not fingerprint or shards_of(folder / name):
        return None
    for earlier in map(RoundFolder, numbered_before(folder.path)):
        if not earlier.is_done("infer") or not shards_of(earlier / name):
            continue
        try:
            same = earlier.facts("infer").get(FINGERPRINTS, {}).get(name) == fingerprint
        except (ValueError, KeyError) as error:
            log.warning("the mark of %s is damaged (%s); its detections are not taken over", earlier.path, error)
            continue
        if same:
            shards = link_shards(earlier / name, folder / name)
            number = int(earlier.path.name)
            log.info("%d files of %s taken over from round %d: the detector is the same", shards, name, number)
            return number
    return None
