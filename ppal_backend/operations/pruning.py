"""Retention: the files of a project's last versions stay, older ones go."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from ppal_backend.errors import ArtifactsUnavailable
from ppal_backend.files import read_json
from ppal_backend.rounds.mirror import open_mirror
from ppal_backend.rounds.retention import Pruned, prune_rounds
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion, RoundRecord, Store

log = logging.getLogger(__name__)


def prune_project(settings: Settings, store: Store, project_id: int, dry_run: bool = False) -> list[Pruned]:
    """Remove the files of versions older than the last ``keep_artifacts``, never those of the active version, of the
    model that predicts, or of what an open round needs."""
    versions = store.versions.of_project(project_id)
    kept = versions[-settings.keep_artifacts :] + [v for v in versions if v.active]
    predicts = store.versions.active(project_id, with_model=True)
    kept += [predicts] if predicts is not None else []
    if not kept:
        return []
    root = settings.project_folder(project_id) / "rounds"
    opened = [r for r in store.rounds.of_project(project_id) if r.finished_at is None]
    checkpoints = {settings.model_dir.resolve() / v.checkpoint for v in kept if v.checkpoint}
    checkpoints |= set(_models_of(root, opened))
    whole = {v.round_number for v in kept} | {r.number for r in opened}
    oldest = _oldest(versions, settings.keep_artifacts)
    pruned = prune_rounds(root, whole, oldest, checkpoints, dry_run)
    if not dry_run:
        names = [str(c.relative_to(root)) for c in checkpoints if c.is_relative_to(root)]
        _prune_copies(settings, store.projects.get(project_id).key, whole, oldest, names)
    if pruned and not dry_run:
        mib = sum(p.size_bytes for p in pruned) / 2**20
        log.info("project %d: files of %d old rounds removed, %.0f MiB", project_id, len(pruned), mib)
    return pruned


def _prune_copies(settings: Settings, key: str, kept: set[int], before: int, checkpoints: list[str]) -> None:
    mirror = open_mirror(settings)
    if mirror is None:
        return
    try:
        gone = mirror.prune(key, kept, before, checkpoints)
    except ArtifactsUnavailable as error:
        log.warning("old rounds stay in the bucket until the next time: %s", error)
    else:
        log.info("files of %d old rounds removed from %s", len(gone), mirror.bucket.name)


def _oldest(versions: list[ModelVersion], keep: int) -> int:
    return min(v.round_number for v in versions[-keep:])


def _models_of(root: Path, rounds: list[RoundRecord]) -> Iterator[Path]:
    """Checkpoints that open rounds were given."""
    for record in rounds:
        spec = root / str(record.number) / "spec.json"
        try:
            model = read_json(spec).get("model") if spec.is_file() else None
        except json.JSONDecodeError:  # damaged: the round starts with what is in force then
            continue
        if model:
            yield Path(model["checkpoint"])
