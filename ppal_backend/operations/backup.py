"""A backup is one tar file: the state database, what the active versions need, the operator's own detectors, and a
manifest with checksums.

Images, exports and detections are not in it: Label Studio has the images and annotations, a round makes the rest
again. Neither are secrets: the token and passwords stand in the environment alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version as release_of
from pathlib import Path
from typing import Any

from ppal_backend.detector.zoo import ZOO_FILE
from ppal_backend.errors import NoState, StateError, StoreUnavailable
from ppal_backend.files import atomic_file, sha256_of
from ppal_backend.operations.pruning import move_lost_away
from ppal_backend.rounds.folder import Rounds
from ppal_backend.settings import CONFIG_FILE, Settings
from ppal_backend.store import Database, Store, database_file, open_store
from ppal_backend.structures.round import OnProgress, Progress

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
DATABASE = "ppal.db"
FORMAT = 1
SMALL = (
    "spec.json",
    "metrics.json",
    "query_set.json",
    "steps/*.json",
    "train/*.json",
    "adopt/*.json",
    "dataset/labels.json",
)


def back_up(settings: Settings, store: Store, target: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Write a backup; service and worker may go on meanwhile.

    Args:
        settings: where the state lies.
        store: the state.
        target: file to write.
        on_progress: told bytes of ``checksums``, then of ``writing``.

    Returns:
        The manifest. Its ``database`` is null for a PostgreSQL, which ``pg_dump`` backs up; ``own_zoo`` says folder,
        files and bytes of the operator's own detectors, null without; ``left_out`` names what is needed and not in it.

    Raises:
        StateError: ``target`` exists.
        ArtifactsUnavailable: the bucket does not answer.
        DamagedArtifact: a file of the bucket is not as it was written.
    """
    if target.exists():
        raise StateError(f"expected a new file to back up to, got {target}, which exists; choose another name")
    root = settings.model_dir.resolve()
    with tempfile.TemporaryDirectory(dir=root if root.is_dir() else None, prefix=".backup-") as scratch:
        left_out: list[str] = []
        zoo = _own_detectors(settings, Path(scratch), left_out)
        files = {str(path.relative_to(root)): path for path in _files(settings, store, left_out)} | zoo
        source = database_file(settings.state_url)
        if source is not None:
            files[DATABASE] = _copy_database(source, Path(scratch) / DATABASE)
        manifest = {
            "format": FORMAT,
            "release": release_of("ppal-backend"),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "database": None if source is None else DATABASE,
            "own_zoo": {
                "folder": str(settings.own_zoo.relative_to(root)),
                "files": len(zoo),
                "bytes": sum(path.stat().st_size for path in zoo.values()),
            }
            if zoo
            else None,
            "left_out": left_out,
            "sha256": {name: sha256_of(path) for name, path in _counted("checksums", files, on_progress)},
        }
        with atomic_file(target) as file, tarfile.open(fileobj=file, mode="w", dereference=True) as archive:
            _add_manifest(archive, manifest)
            for name, path in _counted("writing", files, on_progress):
                archive.add(path, arcname=name, recursive=False)
    return manifest


def restore(
    settings: Settings, source: Path, force: bool = False, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Put a backup into the data folder. What is there is moved to ``replaced-…`` within it, not deleted.

    The operator's own detectors there stay, unless the backup brings some.

    Args:
        settings: where to.
        source: file that :func:`back_up` wrote.
        force: also into a folder that holds data.
        on_progress: told bytes of ``checking``.

    Raises:
        StateError: ``source`` is no backup, damaged, or of a newer release; there is data and not ``force``, or a
            database outside the data folder; or a round is running.
    """
    if not source.is_file():
        raise StateError(f"expected a backup made by ppal backup, got no file {source}; correct the path")
    root = _made(settings.model_dir.resolve())
    manifest = _manifest_of(source)
    if force:
        _refuse_while_running(settings)
    place = _place_of_database(settings, manifest)
    brought = {name.split("/")[0] for name in manifest["sha256"]}
    if not force and (there := _occupied(root, brought, settings)):
        raise StateError(
            f"expected an empty data folder to restore to, got {root} with {len(there)} entries; use "
            "--force to move them aside"
        )
    with tempfile.TemporaryDirectory(dir=root, prefix=".restore-") as scratch, contextlib.ExitStack() as at_the_end:
        _unpack(source, manifest["sha256"], Path(scratch), on_progress)
        if place is not None:
            database = _at_this_schema(Path(scratch) / DATABASE, source)
            copy = at_the_end.enter_context(atomic_file(place))  # its disk may be another one
            with database.open("rb") as file:
                shutil.copyfileobj(file, copy)
            copy.flush()
        occupied = _occupied(root, brought, settings)  # SQLite's log comes and goes
        if occupied:
            aside = root / f"replaced-{int(time.time())}"
            aside.mkdir()
            for path in occupied:
                path.rename(aside / path.name)
            log.warning("what was in %s is now in %s", root, aside)
        for name in brought - {DATABASE}:
            (Path(scratch) / name).rename(root / name)
    _warn_of_missing(settings, manifest)
    return manifest


def _files(settings: Settings, store: Store, left_out: list[str]) -> Iterator[Path]:
    """What the active versions need of their rounds, from the bucket where this machine lacks it, and each project's
    claim to its folder; ``left_out`` gets the checkpoints that are gone."""
    root, rounds = settings.model_dir.resolve(), Rounds(settings)
    for project in store.projects.all():
        claim = settings.project_folder(project.id) / "project.json"
        yield from (p for p in [claim] if p.is_file())
        active = [store.versions.active(project.id), store.versions.active(project.id, with_model=True)]
        numbers = {v.round_number for v in active if v is not None}
        checkpoints = {root / v.checkpoint for v in active if v is not None and v.checkpoint}
        move_lost_away(settings, store, project.id)
        for checkpoint in checkpoints:
            rounds.fetch_checkpoint(project.key, str(checkpoint.relative_to(root)))
        for number in numbers:
            rounds.fetch_shown(project.key, project.id, number)
        numbers |= {int(c.parent.parent.name) for c in checkpoints if c.parent.parent.name.isdigit()}
        for number in sorted(numbers):
            for pattern in SMALL:
                found = rounds.path(project.id, number).glob(pattern)
                yield from (p for p in found if not p.name.startswith("."))
        for checkpoint in checkpoints:
            if checkpoint.is_file():
                yield checkpoint
            else:
                log.warning("the backup is without %s, which an active version needs: it is gone", checkpoint)
                left_out.append(str(checkpoint))


def _own_detectors(settings: Settings, scratch: Path, left_out: list[str]) -> dict[str, Path]:
    """Every file of the operator's own zoo by its name in the backup, where the zoo lies in the data folder: a
    checkpoint holds no architecture, and trainings want the initial weights.

    The table is copied before the files are listed, since ``ppal zoo add`` may replace it meanwhile: files first,
    then the table.
    """
    root, zoo = settings.model_dir.resolve(), settings.own_zoo
    table = zoo / ZOO_FILE
    if root not in zoo.parents:
        if table.is_file():
            log.warning("the backup is without your own detectors in %s, outside MODEL_DIR: copy that folder too", zoo)
            left_out.append(str(zoo))
        return {}
    copies = {}
    if table.is_file():
        copies[str(table.relative_to(root))] = Path(shutil.copy(table, scratch / ZOO_FILE))
    found = [Path(folder, name) for folder, _, names in os.walk(zoo, followlinks=True) for name in names]
    return {
        str(path.relative_to(root)): path for path in found if path.is_file() and not path.name.startswith(".")
    } | copies


def _copy_database(source: Path, target: Path) -> Path:
    """A consistent copy while others write."""
    try:
        with contextlib.closing(sqlite3.connect(source)) as live, contextlib.closing(sqlite3.connect(target)) as copy:
            live.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, no log beside it
    except sqlite3.Error as error:
        raise StoreUnavailable(
            f"expected a copy of {source} in {target.parent}, got: {error}; make room on that disk, then back up again"
        ) from error
    return target


def _add_manifest(archive: tarfile.TarFile, manifest: dict[str, Any]) -> None:
    data = json.dumps(manifest, indent=1).encode()
    info = tarfile.TarInfo(MANIFEST)
    info.size, info.mtime = len(data), int(time.time())
    archive.addfile(info, io.BytesIO(data))


def _manifest_of(source: Path) -> dict[str, Any]:
    try:
        with tarfile.open(source, mode="r:") as archive:
            file = archive.extractfile(MANIFEST)
            if file is None:
                raise ValueError(f"{MANIFEST} is no file")
            manifest = dict(json.load(file))
        manifest["sha256"] = dict(manifest["sha256"])
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"expected a backup made by ppal backup, got {source}: {error}") from None
    if manifest.get("format") != FORMAT:
        raise StateError(f"expected a backup of format {FORMAT}, got {manifest.get('format')!r}; use a newer release")
    return manifest


def _unpack(source: Path, sums: Mapping[str, str], folder: Path, on_progress: OnProgress | None) -> None:
    try:
        with tarfile.open(source, mode="r:") as archive:
            archive.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise StateError(f"expected a backup made by ppal backup, got {source}: {error}") from None
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    found.pop(MANIFEST)
    wrong = sorted(found.keys() ^ sums.keys()) or [
        name for name, path in _counted("checking", found, on_progress) if sha256_of(path) != sums[name]
    ]
    if wrong:
        raise StateError(f"the backup {source} is damaged: {', '.join(wrong[:3])}; nothing was changed")


def _warn_of_missing(settings: Settings, manifest: Mapping[str, Any]) -> None:
    """Tell what the active versions need and the backup did not bring to where it is looked for."""
    for path in manifest.get("left_out", ()):
        log.warning("the backup is without %s, which active versions may need: copy it from where it was made", path)
    zoo = manifest.get("own_zoo")
    place = settings.model_dir.resolve() / zoo["folder"] if zoo else None
    if place is not None and place != settings.own_zoo:
        log.warning(
            "the detectors of the backup are in %s, but PPAL_MODEL_ZOO is %s: correct it", place, settings.own_zoo
        )


def _counted(step: str, files: Mapping[str, Path], on_progress: OnProgress | None) -> Iterator[tuple[str, Path]]:
    """The files by name; after each, how many bytes are done."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    done, total = 0, sum(sizes.values())
    for name in sorted(files):
        yield name, files[name]
        done += sizes[name]
        if on_progress is not None:
            on_progress(Progress(step, done, total))


def _place_of_database(settings: Settings, manifest: dict[str, Any]) -> Path | None:
    if manifest.get("database") is None:
        return None
    place = database_file(settings.state_url)
    if place is None:
        raise StateError(
            "the backup holds a SQLite database, but PPAL_DATABASE_URL names another kind; unset it to restore"
        )
    beside = (f"{place.name}{suffix}" for suffix in ("", "-wal", "-shm", "-journal"))
    there = [name for name in beside if (place.parent / name).exists()]
    if there and place.parent.resolve() != settings.model_dir.resolve():
        raise StateError(
            f"expected no database at {place} yet, got {', '.join(there)} in {place.parent}; stop the worker and the "
            "service, move them away together, then restore"
        )
    return place


def _at_this_schema(database: Path, source: Path) -> Path:
    """The unpacked database, brought to the schema of this release where it is older."""
    try:
        Database(f"sqlite:///{database}").close()
    except StateError as error:
        raise StateError(f"the backup {source} cannot be used, nothing was changed: {error}") from None
    return database


def _refuse_while_running(settings: Settings) -> None:
    """Asks the database that is to be replaced, of whatever release; one that cannot be read is no hindrance."""
    try:
        with contextlib.closing(open_store(settings, create=False, any_schema=True)) as store:
            busy = store.rounds.held_projects()
    except NoState:
        return
    except (StateError, StoreUnavailable) as error:
        log.warning("cannot tell whether a round is running, --force goes on: %s", str(error).rpartition("; ")[0])
        return
    if busy:
        raise StateError(f"a round of project {busy[0]} is running; stop the worker and the service, then restore")


def _occupied(root: Path, brought: Collection[str], settings: Settings) -> list[Path]:
    """Entries of the data folder that a restore moves aside."""
    return [path for path in root.iterdir() if path.name in brought or not _stays(path, settings)]


def _stays(path: Path, settings: Settings) -> bool:
    """Whether an entry of the data folder is no state: settings, backups (the image starts there), cache, the
    operator's own detectors, and a folder that holds the database, which may be a disk."""
    place, zoo, database = path.resolve(), settings.own_zoo, database_file(settings.state_url)
    if database is not None and place in (database.parent.resolve() / database.name).parents:
        return True
    mine = path.name == CONFIG_FILE or path.suffix == ".tar" or place == settings.cache_dir.resolve()
    return mine or path.name.startswith((".", "replaced-")) or place == zoo or place in zoo.parents


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
