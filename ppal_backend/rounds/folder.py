"""The folders of rounds: a mark per finished step, the files the steps leave for each other, and their copies.

A mark holds the SHA-256 of every file that its step left. A round that is taken up again checks them: what is
damaged is taken away, and its step and those after it are done again.

For machines that share no disk a bucket (``PPAL_ARTIFACTS``) holds copies. When a step is done its files are copied,
its mark last: what the bucket has a mark of is there as a whole. Where a machine lacks files, it fetches them and
checks them by the SHA-256 in the mark. Without a bucket nothing of this happens.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ppal_backend.errors import ArtifactsUnavailable, DamagedArtifact, OutOfSpace, StateError
from ppal_backend.files import atomic_file, read_json, sha256_of, write_json
from ppal_backend.rounds.bucket import Bucket
from ppal_backend.settings import Settings

log = logging.getLogger(__name__)

GIB = 1024**3

OUTPUTS: dict[str, tuple[str, ...]] = {
    "export": ("export/*",),
    "dataset": ("dataset/*",),
    "adopt": ("adopt/*.json", "adopt/*.pth"),
    "train": ("train/*.json", "train/*.pth"),
    "evaluate": ("metrics.json", "evaluation/*.npz"),
    "infer": ("detections/*.npz", "labelled_detections/*.npz"),
    "candidates": ("candidates.json",),
    "query": ("query_set.json", "map.json"),
    "publish": ("publish.json",),
}
"""What each step leaves, in the order of the steps."""

STATES = ("spec.json", "publish.json")
"""Small files that are written between steps, and that a round cannot be resumed well without."""

IDENTITY = "round.json"
"""Which round the folder, or its copy, is of: numbers come again where the state's database was lost or restored."""

_REPLACED = ".replaced-"

GROW_WITH_THE_POOL = frozenset(
    {"dataset/pool.json", "dataset/data.json", "candidates.json", "query_set.json", "map.json"}
)

NEEDED_AFTER_PUBLISHING = ("adopt", "train", "evaluate", "query")
MODELS = ("adopt", "train")
"""Steps that leave a checkpoint."""

SHOWN = ("metrics.json", "query_set.json", "map.json", "dataset/pool.json", "dataset/quality.json")
"""What pages show of a round, beside its marks."""

QUEUE = ("spec.json", "query_set.json", "dataset/pool.json", "detections")
"""What a round's queue is published again from."""

HEAVY = ("export", "dataset", "adopt", "train", "evaluation", "detections", "labelled_detections", "candidates.json")
"""What is removed of a round. Its spec, marks, metrics and query set stay: they are small and tell its story."""

RESUMABLE = ("train/images", "train/*.pth", "detections", "labelled_detections")
"""What is removed of a round that failed or was cancelled: nobody goes on with it. The log of its training stays."""


class Rounds:
    """Every round's folder, whether it lies on this machine or in the bucket: the one thing that opens them.

    In the bucket projects lie under their key, which tells them from others that get the same id later.

    Args:
        settings: the operator's settings: where the data folder lies, and the bucket.
        bucket: replaces the one of the settings (tests).
    """

    def __init__(self, settings: Settings, bucket: Bucket | None = None) -> None:
        self._settings = settings
        if bucket is not None:
            self.bucket = bucket

    @cached_property
    def bucket(self) -> Bucket | None:
        """Where the copies lie; None without ``PPAL_ARTIFACTS``.

        Raises:
            SettingsError: the address is none, or the package for it is not installed.
        """
        return Bucket(self._settings.artifacts) if self._settings.artifacts else None

    def of_project(self, project_id: int) -> Path:
        """The folder with one folder per round of a project."""
        return self._settings.project_folder(project_id) / "rounds"

    def path(self, project_id: int, number: int) -> Path:
        """Where a round's folder lies on this machine; nothing is fetched, and it need not exist."""
        return self.of_project(project_id) / str(number)

    def open(
        self,
        key: str,
        project_id: int,
        number: int,
        identity: str,
        first_attempt: bool,
        fence: Callable[[], None] = lambda: None,
    ) -> RoundFolder:
        """A round's folder to work in: with what any machine has done of it, and without what is damaged.

        Where the images of its data set are missing on this machine, that step is done again: it fetches them. What
        another round left under this number is moved away here (``N.replaced-TIME``) and deleted in the bucket.

        Args:
            key: the project's key; the project's folder becomes its own.
            project_id: the project.
            number: the round.
            identity: what tells the round from others of its number.
            first_attempt: whether nobody can have worked at the round before. It decides where no identity was noted,
                as by earlier releases: what there is is this round's, unless this is its first attempt.
            fence: called before something is written to the bucket; raises when the round is no longer this process's.

        Raises:
            ArtifactsUnavailable: the bucket does not answer.
        """
        claim_project_folder(self._settings.project_folder(project_id), key)
        copy = self._copy(key, project_id, number, fence)
        path, noted = self.path(project_id, number), None if copy is None else copy.identity()
        is_another = first_attempt if noted is None else noted != identity
        claim_round_folder(path, identity, first_attempt or is_another)
        folder = RoundFolder(path, copy)
        folder.repair()
        if copy is not None:
            if is_another:
                copy.forget()
            if noted != identity:
                copy.state_written(IDENTITY)
            fetched = copy.synchronise(folder)
            if "dataset" in fetched and not folder.is_done("infer") and not _has_images(folder):
                folder.undo(["dataset"])
        return folder

    def move_lost_away(self, project_id: int, identities: Callable[[], Mapping[int, str]]) -> None:
        """Move away what this machine has of rounds that the state does not know, so that nothing of them passes for
        rounds of their numbers: those are fetched.

        Without a bucket nothing could be fetched, and nothing is moved.

        Args:
            project_id: the project.
            identities: gives the identity of every round that the state knows, by its number.
        """
        if self.bucket is None:
            return
        there = [path for path in self.of_project(project_id).glob("*") if path.name.isdigit()]
        known = identities()  # afterwards: a round that begins meanwhile is known before it has a folder
        for path in there:
            identity = known.get(int(path.name))
            with _locked(path.parent):
                if path.is_dir() and (identity is None or _noted_identity(path) not in (None, identity)):
                    _move_away(path)

    def replaced(self, project_id: int) -> list[Replaced]:
        """What was moved away, on this machine: rounds of a state that is gone, and the folder of an earlier project
        with this id."""
        project = self.of_project(project_id).parent
        places = (*self.of_project(project_id).glob("*.replaced-*"), *project.parent.glob(f"{project.name}.replaced-*"))
        found = [(path, path.name.rpartition(_REPLACED)) for path in sorted(places)]
        return [Replaced(path, name, int(at)) for path, (name, _, at) in found if at.isdigit()]

    def fetch(self, key: str, project_id: int, number: int, steps: Sequence[str]) -> Path:
        """A round's folder for reading, with the files of these steps as far as they are to be had.

        Raises:
            DamagedArtifact: a copy is not as it was written.
            ArtifactsUnavailable: the bucket does not answer.
        """
        copy = self._copy(key, project_id, number)
        if copy is not None:
            copy.need(steps)
        return self.path(project_id, number)

    def fetch_checkpoint(self, key: str, checkpoint: str) -> Path:
        """A version's checkpoint, given relative to the data folder, on this machine if it is to be had.

        Raises:
            DamagedArtifact: its copy is not as it was written.
            ArtifactsUnavailable: the bucket does not answer.
        """
        path, parts = self._settings.model_dir.resolve() / checkpoint, Path(checkpoint).parts
        if self.bucket is not None and not path.is_file() and len(parts) == 6 and parts[1].isdigit():
            self.fetch(key, int(parts[1]), int(parts[3]), MODELS)
        return path

    def fetch_shown(self, key: str, project_id: int, number: int) -> Path:
        """A round's folder with what pages show of it.

        Raises:
            DamagedArtifact: a copy is not as it was written.
            ArtifactsUnavailable: the bucket does not answer.
        """
        copy = self._copy(key, project_id, number)
        if copy is not None:
            copy.need_shown()
        return self.path(project_id, number)

    def show(self, key: str, project_id: int, number: int) -> Path:
        """As :meth:`fetch_shown`, as far as it is to be had: a page shows less rather than nothing."""
        try:
            return self.fetch_shown(key, project_id, number)
        except (ArtifactsUnavailable, DamagedArtifact) as error:
            log.warning("round %d of project %d cannot be shown as a whole: %s", number, project_id, error)
            return self.path(project_id, number)

    def has_queue(self, project_id: int, number: int) -> bool:
        """Whether a round's queue could be published again from what is on this machine."""
        path = self.path(project_id, number)
        return all((path / name).exists() for name in QUEUE)

    def with_queue(self, key: str, project_id: int, numbers: Collection[int]) -> set[int]:
        """Those of the rounds whose queue could be published again, from this machine or from the bucket. While that
        is away, those of this machine."""
        here = {number for number in numbers if self.has_queue(project_id, number)}
        if self.bucket is None or len(here) == len(set(numbers)):
            return here
        prefix = _prefix(key)
        there: dict[str, set[str]] = {}
        try:
            for copy in self.bucket.names(prefix):
                number, _, name = copy.removeprefix(f"{prefix}/").partition("/")
                there.setdefault(number, set()).update((name, name.split("/")[0]))
        except ArtifactsUnavailable as error:
            log.warning("which rounds of project %d can be fetched is not known: %s", project_id, error)
        return here | {number for number in numbers if there.get(str(number), set()).issuperset(QUEUE)}

    def prune_copies(self, key: str, kept: Collection[int], before: int, checkpoints: Collection[str]) -> list[int]:
        """Delete the copies of old rounds' heavy files, as ``operations/pruning.py`` does here.

        Args:
            key: The project's key.
            kept: Numbers of rounds to leave whole.
            before: Only rounds with a lower number are touched.
            checkpoints: Files that stay, relative to the project's ``rounds`` folder; their folder stays with them.

        Returns:
            The numbers of the rounds of which something was deleted.
        """
        if self.bucket is None:
            return []
        prefix = _prefix(key)
        staying = {tuple(Path(c).parts[:2]) for c in checkpoints}
        doomed: dict[int, list[str]] = {}
        for name in self.bucket.names(prefix):
            number, *parts = name.removeprefix(f"{prefix}/").split("/")
            if not number.isdigit() or int(number) in kept or int(number) >= before:
                continue
            if parts and parts[0] in HEAVY and (number, parts[0]) not in staying:
                doomed.setdefault(int(number), []).append(name)
        for names in doomed.values():
            self.bucket.delete(names)
        return sorted(doomed)

    def _copy(
        self, key: str, project_id: int, number: int, fence: Callable[[], None] = lambda: None
    ) -> RoundMirror | None:
        if self.bucket is None:
            return None
        return RoundMirror(self.bucket, f"{_prefix(key)}/{number}", self.path(project_id, number), fence)


@dataclass(frozen=True)
class Replaced:
    """A folder that was moved away: what it was called, and when that was (Unix time)."""

    path: Path
    name: str
    at_s: int


class RoundFolder:
    """Artifacts of one round. A step is done when its mark is on disk; marks are written last.

    Layout: ``round.json`` (which round it is), ``spec.json``, ``steps/<step>.json`` (mark: seconds and facts), then
    what the steps write: ``export/``, ``dataset/``, ``train/``, ``metrics.json``, ``detections/``,
    ``candidates.json``, ``query_set.json``, ``publish.json``.
    """

    def __init__(self, path: Path, copy: RoundMirror | None = None) -> None:
        self.path, self._copy = path, copy
        path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def is_done(self, step: str) -> bool:
        """Whether a step has left its mark."""
        return self._mark(step).is_file()

    def mark_done(self, step: str, seconds: float, facts: dict[str, Any]) -> None:
        """Leave the mark of a step: everything it wrote must be on disk by now."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        sums = {str(path.relative_to(self.path)): sha256_of(path) for path in outputs_of(self.path, step)}
        mark = {"seconds": round(seconds, 3), "finished_at": stamp, "facts": facts, "sha256": sums}
        write_json(self._mark(step), mark)
        if self._copy is not None:
            self._copy.step_done(step)

    def repair(self) -> list[str]:
        """Check what earlier attempts left, before a round is taken up again.

        Returns:
            The steps whose marks were taken away: they are done again. A training that is done again starts from
            nothing, an inference keeps its undamaged shards.
        """
        for name in STATES:
            if (self.path / name).is_file() and not _is_json(self.path / name):
                log.warning("%s is damaged and left out", self.path / name)
                (self.path / name).unlink()
        done = [step for step in OUTPUTS if self.is_done(step)]
        checked = [s for s in done if s in NEEDED_AFTER_PUBLISHING] if "publish" in done else done
        for step in checked:
            damaged = self._damaged(step)
            if damaged is not None:
                later = list(OUTPUTS)[list(OUTPUTS).index(step) :]
                return self._undo_damaged(later, damaged)
        return []

    def _damaged(self, step: str) -> list[Path] | None:
        """Files of a finished step that are not as it left them; [] when its mark is damaged, None when all is well.

        Marks from before there were checksums tell nothing."""
        if not _is_json(self._mark(step)):
            return []
        sums = read_json(self._mark(step)).get("sha256", {})
        damaged = [self.path / n for n, wanted in sums.items() if not _has(self.path / n, wanted)]
        return damaged or None

    def undo(self, steps: Sequence[str]) -> None:
        """Take away steps, finished or half done, with what they left; what publishing has come to stays."""
        for step in reversed(steps):
            self._mark(step).unlink(missing_ok=True)
            for path in [] if step == "publish" else outputs_of(self.path, step):
                path.unlink(missing_ok=True)
            if step in MODELS:
                shutil.rmtree(self.path / step, ignore_errors=True)

    def _undo_damaged(self, steps: list[str], damaged: list[Path]) -> list[str]:
        """Take away a damaged step and what came of it: half-done steps too, or their files would pass for results of
        what the step leaves when it is done again."""
        finished = [step for step in steps if self.is_done(step)]
        names = ", ".join(str(path.relative_to(self.path)) for path in damaged) or f"steps/{steps[0]}.json"
        log.error("%s: %s damaged; done again: %s", self.path, names, ", ".join(finished))
        for step in reversed(steps):
            self._mark(step).unlink(missing_ok=True)
            kept = step == "publish" or (step == "infer" and step == steps[0])
            for path in damaged if kept else outputs_of(self.path, step):
                path.unlink(missing_ok=True)
            if step in MODELS:
                shutil.rmtree(self.path / step, ignore_errors=True)
        return finished

    def facts(self, step: str) -> dict[str, Any]:
        """What a finished step noted."""
        return dict(read_json(self._mark(step))["facts"])

    def seconds(self) -> dict[str, float]:
        """Seconds of every finished step, oldest first."""
        marks = sorted((self.path / "steps").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        return {p.stem: float(read_json(p)["seconds"]) for p in marks}

    def read(self, name: str) -> Any:
        """A JSON artifact."""
        return read_json(self.path / name)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON artifact, atomically."""
        write_json(self.path / name, value, compact=name in GROW_WITH_THE_POOL)
        if self._copy is not None and name in STATES:
            self._copy.state_written(name)

    def checkpoint(self, stored: str) -> str:
        """A checkpoint of this round that was stored with its path, here: the path may be another machine's."""
        here = self.path / Path(stored).parent.name / Path(stored).name
        return str(here) if not Path(stored).is_file() and here.is_file() else stored

    def _mark(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"


class RoundMirror:
    """The copy of one round's folder in the bucket; a :class:`RoundFolder` tells it of new files.

    Every method raises:
        ArtifactsUnavailable: the bucket does not answer.
    """

    def __init__(self, bucket: Bucket, prefix: str, path: Path, fence: Callable[[], None] = lambda: None) -> None:
        self._bucket, self._prefix, self._path, self._fence = bucket, prefix, path, fence

    def step_done(self, step: str) -> None:
        """Copy a finished step's files, then its mark."""
        mark = self._mark(step)
        for name in read_json(mark)["sha256"]:
            self._fence()
            self._bucket.upload(self._path / name, self._name(name))
        self._fence()
        self._bucket.write(self._name(f"steps/{step}.json"), mark.read_bytes())

    def state_written(self, name: str) -> None:
        """Copy a small file that must not be lost between steps."""
        self._fence()
        self._bucket.write(self._name(name), (self._path / name).read_bytes())

    def forget(self) -> None:
        """Delete the copy: it is of another round, that had this number in a database that is gone."""
        names = self._bucket.names(self._prefix)
        if names:
            log.warning("%s/%s is of an earlier installation and deleted", self._bucket.name, self._prefix)
            last = self._name(IDENTITY)  # as long as something is there it is known whose it is
            self._bucket.delete(sorted(names, key=lambda name: (name == last, "/steps/" not in name)))

    def identity(self) -> str | None:
        """Which round it is of; None where none is noted, or what is noted cannot be read."""
        content = self._bucket.read(self._name(IDENTITY))
        return None if content is None else _identity_in(content)

    def synchronise(self, folder: RoundFolder) -> list[str]:
        """Bring folder and copy to the same state, before a round is taken up again. The copy decides: it is what all
        machines go by. Steps that only this machine has are copied now; a damaged copy is given up with the steps
        after it, and they are done again.

        Returns:
            The steps that were fetched.
        """
        for name in STATES:
            self._fetch_state(name)
        fetched: list[str] = []
        foreign = False
        for step in OUTPUTS:
            theirs, mine = self._bucket.read(self._name(f"steps/{step}.json")), self._mark(step)
            if theirs is None and foreign:
                folder.undo([step])
            elif theirs is None and mine.is_file():
                self.step_done(step)
            elif theirs is not None and not (mine.is_file() and mine.read_bytes() == theirs):
                foreign = foreign or mine.is_file()
                try:
                    self._fetch_step(step, theirs)
                except DamagedArtifact as error:
                    self._give_up(folder, step, error)
                    return fetched
                fetched.append(step)
        return fetched

    def need(self, steps: Sequence[str]) -> None:
        """Fetch finished steps that are not here; steps that nobody has finished are left out.

        Raises:
            DamagedArtifact: a copy is not as it was written.
        """
        self._note_identity()
        for step in steps:
            if self._is_whole(step):
                continue
            theirs = self._bucket.read(self._name(f"steps/{step}.json"))
            if theirs is not None:
                self._fetch_step(step, theirs)
        if not (self._path / "spec.json").is_file():
            self._fetch_state("spec.json")

    def need_shown(self) -> None:
        """Fetch what pages show of a round, unless all of it is here."""
        if self._mark("publish").is_file():
            return
        self._note_identity()
        there = set(self._bucket.names(self._name("steps")))
        for step in OUTPUTS:
            mark = self._name(f"steps/{step}.json")
            theirs = self._bucket.read(mark) if mark in there and not self._mark(step).is_file() else None
            if theirs is None:
                continue
            for name, digest in _sums(theirs).items():
                if name in SHOWN:
                    self._bucket.download(self._name(name), self._path / name, digest)
            _write(self._mark(step), theirs)

    def _note_identity(self) -> None:
        """Before anything is fetched to be read: which round it is of."""
        if not self._path.exists():
            self._fetch_state(IDENTITY)

    def _fetch_step(self, step: str, mark: bytes) -> None:
        sums = _sums(mark)
        self._mark(step).unlink(missing_ok=True)  # not done here, until all of it is here
        for path in outputs_of(self._path, step):
            if str(path.relative_to(self._path)) not in sums:
                path.unlink()
        for name, digest in sums.items():
            self._bucket.download(self._name(name), self._path / name, digest)
        _write(self._mark(step), mark)

    def _fetch_state(self, name: str) -> None:
        content = self._bucket.read(self._name(name))
        if content is not None:
            _write(self._path / name, content)

    def _give_up(self, folder: RoundFolder, step: str, error: DamagedArtifact) -> None:
        later = list(OUTPUTS)[list(OUTPUTS).index(step) :]
        log.error("%s; done again from step %r", error, step)
        self._bucket.delete([self._name(f"steps/{name}.json") for name in reversed(later)])
        folder.undo(later)

    def _is_whole(self, step: str) -> bool:
        mark = self._mark(step)
        return mark.is_file() and all((self._path / name).is_file() for name in read_json(mark)["sha256"])

    def _mark(self, step: str) -> Path:
        return self._path / "steps" / f"{step}.json"

    def _name(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def outputs_of(folder: Path, step: str) -> list[Path]:
    """What a step has left in a round's folder."""
    found = [path for pattern in OUTPUTS.get(step, ()) for path in sorted(folder.glob(pattern))]
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def claim_project_folder(folder: Path, key: str) -> None:
    """Make ``folder`` the one of the project with this key; rounds of another project with the same id
    (Label Studio was set up afresh) are moved aside, not mixed in and not deleted."""
    owner = folder / "project.json"
    if owner.is_file() and read_json(owner)["key"] != key:
        _move_away(folder)
    if not owner.is_file():
        write_json(owner, {"key": key})


def claim_round_folder(path: Path, identity: str, first_attempt: bool) -> None:
    """Make ``path`` the folder of the round with this identity; what another round left there is moved away."""
    with _locked(path.parent):
        noted = _noted_identity(path)
        if noted == identity:
            return
        if path.is_dir() and any(path.iterdir()) and (noted is not None or first_attempt):
            _move_away(path)
        write_json(path / IDENTITY, {"identity": identity})


def _move_away(path: Path) -> None:
    replaced = path.with_name(f"{path.name}{_REPLACED}{int(time.time())}")
    path.rename(replaced)
    log.warning("%s is of a project or a round that the state does not know: now %s", path, replaced)


@contextmanager
def _locked(rounds: Path) -> Iterator[None]:
    """While no other process of this machine moves folders of these rounds away, or claims them."""
    rounds.mkdir(parents=True, exist_ok=True)
    with (rounds / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _noted_identity(path: Path) -> str | None:
    owner = path / IDENTITY
    return _identity_in(owner.read_bytes()) if owner.is_file() else None


def need_space(folder: Path, min_free_gib: float) -> None:
    """Make sure of some free space where ``folder`` lies.

    Raises:
        OutOfSpace: there is less.
    """
    free_gib = shutil.disk_usage(folder).free / GIB
    if free_gib < min_free_gib:
        raise OutOfSpace(
            f"expected at least {min_free_gib:g} GiB free for {folder}, got {free_gib:.2f}; free some (ppal prune "
            "removes old versions) or set PPAL_MIN_FREE_GIB. The round waits and goes on by itself"
        )


def need_intact(checkpoint: Path, version: str) -> None:
    """Make sure that a version's checkpoint is there, and as its training left it.

    Raises:
        StateError: it is gone or damaged.
    """
    advice = "train again (ppal round PROJECT) or go back to another version (ppal versions PROJECT)"
    if not checkpoint.is_file():
        raise StateError(f"expected the checkpoint of version {version} at {checkpoint}, got no file; {advice}")
    for folder in checkpoint.parents:
        mark = folder / "steps" / f"{checkpoint.parent.name}.json"
        if mark.is_file() and _is_json(mark):
            wanted = read_json(mark).get("sha256", {}).get(str(checkpoint.relative_to(folder)))
            if wanted is not None and sha256_of(checkpoint) != wanted:
                raise StateError(
                    f"expected the checkpoint of version {version} as it was trained (SHA-256 {wanted[:12]}…), got "
                    f"other content in {checkpoint}: the file is damaged; {advice}"
                )
            return


def _has(path: Path, wanted: str) -> bool:
    return path.is_file() and sha256_of(path) == wanted


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except ValueError:
        return False
    return True


def _identity_in(content: bytes) -> str | None:
    try:
        noted = json.loads(content)["identity"]
    except (ValueError, KeyError, TypeError):
        return None
    return noted if isinstance(noted, str) else None


def _has_images(folder: RoundFolder) -> bool:
    files = [entry["path"] for entry in folder.read("dataset/pool.json")]
    for name in ("train", "val"):
        files += [image["file_name"] for image in folder.read(f"dataset/{name}.json")["images"]]
    return all(Path(file).is_file() for file in files)


def _prefix(key: str) -> str:
    return f"projects/{quote(key, safe='')}/rounds"


def _sums(mark: bytes) -> dict[str, str]:
    """File names of a mark with their SHA-256; only names within the round's folder."""
    try:
        sums: dict[str, Any] = json.loads(mark)["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(f"expected a step's mark in the bucket, got a damaged one ({error!r})") from None
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in sums):
        raise DamagedArtifact("expected names of files within the round in its mark, got others")
    return {name: str(digest) for name, digest in sums.items()}


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)
