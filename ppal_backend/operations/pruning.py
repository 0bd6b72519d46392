"""Retention: the files of a project's last versions stay, older ones go, on every machine that has some."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from ppal_backend.datasets import images
from ppal_backend.errors import ArtifactsUnavailable, StoreUnavailable
from ppal_backend.files import read_json
from ppal_backend.rounds.folder import HEAVY, RESUMABLE, Replaced, Rounds
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion, ProjectRecord, RoundRecord, Store

log = logging.getLogger(__name__)

SHARE_OF_DISK = 0.2
LISTED_S = 60.0
FRESH_S = 3600.0  # images fetched or used within this time stay: a data set may be in the making


def prune_project(
    settings: Settings,
    store: Store,
    project_id: int,
    dry_run: bool = False,
    reading: Collection[Path] = (),
    in_bucket: bool = True,
) -> list[Pruned]:
    """Remove the files of versions older than the last ``keep_artifacts``, never those of the active version with its
    model, of one that somebody is going back to, or of what an open round needs; of rounds that failed or were
    cancelled what only they could have gone on with; and what was moved away before the last ``keep_artifacts``
    versions came.

    Args:
        settings: the operator's settings.
        store: the state.
        project_id: the project.
        dry_run: remove nothing.
        reading: checkpoints that stay too, because somebody reads them.
        in_bucket: remove the copies in the bucket as well.

    Returns:
        The rounds of which something is removed on this machine.
    """
    versions = store.versions.of_project(project_id)
    kept = versions[-settings.keep_artifacts :] + [v for v in versions if v.active or v.wanted]
    root, rounds = Rounds(settings).of_project(project_id), store.rounds.of_project(project_id)
    opened = [r for r in rounds if r.finished_at is None]
    checkpoints = {settings.model_dir.resolve() / v.checkpoint for v in kept if v.checkpoint}
    checkpoints |= set(_models_of(root, opened))
    whole = {v.round_number for v in kept} | {r.number for r in opened}
    oldest = _oldest(versions, settings.keep_artifacts)
    ended_early = {r.number for r in rounds if r.state in ("failed", "cancelled")} - whole
    pruned = prune_rounds(root, whole, oldest, checkpoints | set(reading), dry_run, ended_early)
    pruned += _prune_replaced(Rounds(settings).replaced(project_id), versions, settings.keep_artifacts, dry_run)
    if in_bucket and not dry_run:
        names = [str(c.relative_to(root)) for c in checkpoints if c.is_relative_to(root)]
        _prune_copies(settings, store.projects.get(project_id).key, whole, oldest, names)
    if pruned and not dry_run:
        mib = sum(p.size_bytes for p in pruned) / 2**20
        log.info("project %d: files of %d old rounds removed, %.0f MiB", project_id, len(pruned), mib)
    return pruned


def move_lost_away(settings: Settings, store: Store, project_id: int) -> None:
    """Move away what this machine has of rounds that the state does not know: it was restored, or is another one. To be
    done before files of the project are fetched to be read."""
    of_project = store.rounds.of_project
    Rounds(settings).move_lost_away(project_id, lambda: {r.number: r.identity for r in of_project(project_id)})


class FetchedFiles:
    """What a service has fetched from the bucket: nobody runs rounds there, which would prune it.

    Args:
        settings: the operator's settings; without a bucket the worker's pruning is enough, and nothing is done here.
        store: the state.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._lock = threading.Lock()
        self._reading: Counter[Path] = Counter()
        self._settled: set[tuple[int, str]] = set()  # ids and keys of projects
        self._pruned: dict[int, tuple[str, set[Path]]] = {}  # by project: the version in force, what was read just then
        self._listed: dict[str, tuple[float, set[int], set[int]]] = {}  # by key of the project: when, asked for, found

    def settle(self, project: ProjectRecord) -> None:
        """See to it, once for each project, that nothing of lost rounds is read. A state is restored while no service
        runs, and a project that is set up afresh has another key."""
        with self._lock:
            if (project.id, project.key) not in self._settled:
                move_lost_away(self._settings, self._store, project.id)
                self._settled.add((project.id, project.key))

    @contextmanager
    def reading(self, project: ProjectRecord, checkpoint: str) -> Iterator[Path]:
        """A version's checkpoint, given relative to the data folder, fetched where it is missing; it stays until the
        block ends.

        Raises:
            DamagedArtifact: its copy is not as it was written.
            ArtifactsUnavailable: the bucket does not answer.
        """
        self.settle(project)
        path = self._settings.model_dir.resolve() / checkpoint
        with self._lock:
            self._reading[path] += 1
        try:
            yield Rounds(self._settings).fetch_checkpoint(project.key, checkpoint)
        finally:
            with self._lock:
                self._reading[path] -= 1

    def with_queue(self, project: ProjectRecord, numbers: set[int]) -> set[int]:
        """As :meth:`Rounds.with_queue`; the bucket is asked once in ``LISTED_S``, since pages ask every few seconds."""
        at_s, asked, found = self._listed.get(project.key, (0.0, set(), set()))
        if not self._settings.artifacts or asked != numbers or time.monotonic() - at_s > LISTED_S:
            found = Rounds(self._settings).with_queue(project.key, project.id, numbers)
            self._listed[project.key] = time.monotonic(), numbers, found
        return found

    def prune(self, project_id: int, version: str) -> None:
        """Remove what the project needs no more, once for each version that comes into force.

        Args:
            project_id: the project.
            version: its active version.
        """
        if not self._settings.artifacts:
            return
        with self._lock:  # nobody begins to read meanwhile
            root = self._settings.project_folder(project_id)
            reading = {path for path in +self._reading if path.is_relative_to(root)}
            before, read_then = self._pruned.get(project_id, ("", set()))
            if before == version and read_then <= reading:
                return  # else what was read then may go now
            try:
                prune_project(self._settings, self._store, project_id, reading=reading, in_bucket=False)
            except StoreUnavailable as error:
                log.warning("old files stay for now: %s", error)
                return
            self._pruned[project_id] = version, reading


def prune_images(settings: Settings, store: Store, dry_run: bool = False) -> images.Evicted:
    """Keep the folder of fetched images within its limit. What open rounds read, and what the round of the active
    version read, stays; when that alone is more than the limit, the log says so."""
    root = settings.image_folder
    if not root.is_dir():
        return images.Evicted(0, 0, 0)
    share = shutil.disk_usage(root).total * SHARE_OF_DISK
    limit = int(share if settings.image_cache_gib is None else settings.image_cache_gib * 2**30)
    folders, keep = Rounds(settings), set[Path]()
    since = time.time() - FRESH_S
    for project in store.projects.all():
        rounds, active = store.rounds.of_project(project.id), store.versions.active(project.id)
        opened = [r for r in rounds if r.finished_at is None]
        started = [r.started_at.replace(tzinfo=UTC).timestamp() for r in opened if r.started_at is not None]
        since = min([since, *started])
        numbers = {r.number for r in opened} | ({active.round_number} if active is not None else set())
        for number in numbers:
            keep.update(_images_of(folders.path(project.id, number) / "dataset"))
    evicted = images.prune_images(root, limit, keep, since, dry_run)
    if evicted.images and not dry_run:
        log.info("%d fetched images removed, %.0f MiB", evicted.images, evicted.bytes / 2**20)
    if evicted.bytes_left > limit:
        left, most = evicted.bytes_left / 2**30, limit / 2**30
        log.warning("fetched images take %.1f GiB, more than the limit of %.1f, but all are in use", left, most)
    return evicted


def _images_of(dataset: Path) -> Iterator[Path]:
    """Image files that a round's data set names."""
    for name in ("train.json", "val.json", "held_out.json", "validation.json", "pool.json"):
        try:
            content = read_json(dataset / name)
        except (OSError, ValueError):  # not there yet, pruned or damaged
            continue
        entries = content if isinstance(content, list) else content.get("images", [])
        yield from (Path(entry.get("path") or entry.get("file_name")) for entry in entries)


def _prune_copies(settings: Settings, key: str, kept: set[int], before: int, checkpoints: list[str]) -> None:
    rounds = Rounds(settings)
    if rounds.bucket is None:
        return
    try:
        gone = rounds.prune_copies(key, kept, before, checkpoints)
    except ArtifactsUnavailable as error:
        log.warning("old rounds stay in the bucket until the next time: %s", error)
    else:
        log.info("files of %d old rounds removed from %s", len(gone), rounds.bucket.name)


def _oldest(versions: list[ModelVersion], keep: int) -> int:
    return min((v.round_number for v in versions[-keep:]), default=0)


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


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be, of one round; ``round_number`` is None for a whole project's folder."""

    round_number: int | None
    size_bytes: int
    is_replaced: bool = False
    """Whether it was moved away, as of a state that is gone or of an earlier project with this id."""


def prune_rounds(
    rounds: Path,
    keep: Collection[int],
    before: int,
    checkpoints: Collection[Path],
    dry_run: bool = False,
    ended_early: Collection[int] = (),
) -> list[Pruned]:
    """Remove the heavy files of old rounds, and of those that ended early what they would have gone on with.

    Args:
        rounds: The folder with one folder per round.
        keep: Numbers of rounds to leave whole.
        before: Only rounds with a lower number are old.
        checkpoints: Files that stay wherever they lie.
        dry_run: Remove nothing.
        ended_early: Numbers of rounds that failed or were cancelled.

    Returns:
        The rounds of which something is removed, oldest first. What cannot be removed is logged and left.
    """
    numbers = sorted(int(p.name) for p in rounds.glob("*") if p.is_dir() and p.name.isdigit())
    pruned = []
    for number in numbers:
        patterns = HEAVY if number < before else RESUMABLE if number in ended_early else ()
        if number in keep:
            continue
        doomed = [
            path
            for pattern in patterns
            for path in sorted((rounds / str(number)).glob(pattern))
            if not any(checkpoint.is_relative_to(path) for checkpoint in checkpoints)
        ]
        size = sum(f.stat().st_size for path in doomed for f in _files(path))
        if not doomed:
            continue
        pruned.append(Pruned(number, size))
        if not dry_run:
            for path in doomed:
                _remove(path)
    return pruned


def _prune_replaced(
    found: Sequence[Replaced], versions: Sequence[ModelVersion], keep: int, dry_run: bool
) -> list[Pruned]:
    """Remove what was moved away before the last ``keep`` versions came."""
    made_at_s = sorted(v.created_at.replace(tzinfo=UTC).timestamp() for v in versions if v.created_at is not None)
    pruned = []
    for replaced in found:
        if len(made_at_s) < keep or made_at_s[-keep] < replaced.at_s + 1:  # whole seconds
            continue
        number = int(replaced.name) if replaced.path.parent.name == "rounds" and replaced.name.isdigit() else None
        pruned.append(Pruned(number, sum(f.stat().st_size for f in _files(replaced.path)), is_replaced=True))
        if not dry_run:
            _remove(replaced.path)
    return pruned


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        log.warning("%s stays for now: %s", path, error)
