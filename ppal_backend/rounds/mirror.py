"""Rounds' folders and their copies in a bucket, for machines that share no disk.

A round works in its folder. When a step is done its files are copied, its mark last: what the bucket has a mark of is
there as a whole. Where a machine lacks files, it fetches them and checks them by the SHA-256 in the mark. Without a
bucket nothing of this happens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ppal_backend.errors import ArtifactsUnavailable, DamagedArtifact
from ppal_backend.files import atomic_file, read_json
from ppal_backend.rounds.artifacts import OUTPUTS, STATES, RoundFolder, outputs_of
from ppal_backend.rounds.bucket import Bucket
from ppal_backend.rounds.retention import HEAVY
from ppal_backend.settings import Settings

log = logging.getLogger(__name__)

SHOWN = ("metrics.json", "query_set.json", "map.json", "dataset/pool.json", "dataset/quality.json")
"""What pages show of a round, beside its marks."""


def open_mirror(settings: Settings) -> Mirror | None:
    """The copies that the settings ask for; None without ``PPAL_ARTIFACTS``.

    Raises:
        SettingsError: the address is none, or the package for it is not installed.
    """
    return Mirror(Bucket(settings.artifacts), settings.model_dir.resolve()) if settings.artifacts else None


class Mirror:
    """The copies of one data folder's rounds.

    Projects lie under their key, which tells them from others that get the same id later.

    Args:
        bucket: where the copies lie.
        model_dir: the data folder of this machine.
    """

    def __init__(self, bucket: Bucket, model_dir: Path) -> None:
        self.bucket, self._model_dir = bucket, model_dir

    def round(self, key: str, project_id: int, number: int, fence: Callable[[], None] = lambda: None) -> RoundMirror:
        """One round and its copy. ``fence`` is called before something is written there and raises when the round is no
        longer this process's."""
        folder = self._model_dir / "projects" / str(project_id) / "rounds" / str(number)
        return RoundMirror(self.bucket, f"{_prefix(key)}/{number}", folder, fence)

    def need_checkpoint(self, key: str, checkpoint: str) -> None:
        """Fetch a version's checkpoint, given relative to the data folder, unless it is here.

        Raises:
            DamagedArtifact: its copy is not as it was written.
            ArtifactsUnavailable: the bucket does not answer.
        """
        parts = Path(checkpoint).parts
        if (self._model_dir / checkpoint).is_file() or len(parts) != 6 or not parts[1].isdigit():
            return
        self.round(key, int(parts[1]), int(parts[3])).need(("train",))

    def show(self, key: str, project_id: int, number: int) -> None:
        """Fetch what pages show of a round, as far as it is to be had: a page shows less rather than nothing."""
        try:
            self.round(key, project_id, number).need_shown()
        except (ArtifactsUnavailable, DamagedArtifact) as error:
            log.warning("round %d of project %d cannot be shown as a whole: %s", number, project_id, error)

    def prune(self, key: str, kept: Collection[int], before: int, checkpoints: Collection[str]) -> list[int]:
        """Delete the copies of old rounds' heavy files, as :func:`~ppal_backend.rounds.retention.prune_rounds` does.

        Args:
            key: The project's key.
            kept: Numbers of rounds to leave whole.
            before: Only rounds with a lower number are touched.
            checkpoints: Files that stay, relative to the project's ``rounds`` folder; their folder stays with them.

        Returns:
            The numbers of the rounds of which something was deleted.
        """
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


class RoundMirror:
    """One round's folder on this machine and its copy; what a :class:`RoundFolder` tells of new files.

    Every method raises:
        ArtifactsUnavailable: the bucket does not answer.
    """

    def __init__(self, bucket: Bucket, prefix: str, folder: Path, fence: Callable[[], None] = lambda: None) -> None:
        self._bucket, self._prefix, self.folder, self._fence = bucket, prefix, folder, fence

    def step_done(self, step: str) -> None:
        """Copy a finished step's files, then its mark."""
        mark = self._mark(step)
        for name in read_json(mark)["sha256"]:
            self._fence()
            self._bucket.upload(self.folder / name, self._name(name))
        self._fence()
        self._bucket.write(self._name(f"steps/{step}.json"), mark.read_bytes())

    def state_written(self, name: str) -> None:
        """Copy a small file that must not be lost between steps."""
        self._fence()
        self._bucket.write(self._name(name), (self.folder / name).read_bytes())

    def forget(self) -> None:
        """Delete the copy: it is of another round, that had this number in a database that is gone."""
        names = self._bucket.names(self._prefix)
        if names:
            log.warning("%s/%s is of an earlier installation and deleted", self._bucket.name, self._prefix)
            self._bucket.delete(sorted(names, key=lambda name: "/steps/" not in name))

    def take_up(self, folder: RoundFolder) -> list[str]:
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
        for step in steps:
            if self._is_whole(step):
                continue
            theirs = self._bucket.read(self._name(f"steps/{step}.json"))
            if theirs is not None:
                self._fetch_step(step, theirs)
        if not (self.folder / "spec.json").is_file():
            self._fetch_state("spec.json")

    def need_shown(self) -> None:
        """Fetch what pages show of a round, unless all of it is here."""
        if self._mark("publish").is_file():
            return
        there = set(self._bucket.names(self._name("steps")))
        for step in OUTPUTS:
            mark = self._name(f"steps/{step}.json")
            theirs = self._bucket.read(mark) if mark in there and not self._mark(step).is_file() else None
            if theirs is None:
                continue
            for name, digest in _sums(theirs).items():
                if name in SHOWN:
                    self._bucket.download(self._name(name), self.folder / name, digest)
            _write(self._mark(step), theirs)

    def _fetch_step(self, step: str, mark: bytes) -> None:
        sums = _sums(mark)
        self._mark(step).unlink(missing_ok=True)  # not done here, until all of it is here
        for path in outputs_of(self.folder, step):
            if str(path.relative_to(self.folder)) not in sums:
                path.unlink()
        for name, digest in sums.items():
            self._bucket.download(self._name(name), self.folder / name, digest)
        _write(self._mark(step), mark)

    def _fetch_state(self, name: str) -> None:
        content = self._bucket.read(self._name(name))
        if content is not None:
            _write(self.folder / name, content)

    def _give_up(self, folder: RoundFolder, step: str, error: DamagedArtifact) -> None:
        later = list(OUTPUTS)[list(OUTPUTS).index(step) :]
        log.error("%s; done again from step %r", error, step)
        self._bucket.delete([self._name(f"steps/{name}.json") for name in reversed(later)])
        folder.undo(later)

    def _is_whole(self, step: str) -> bool:
        mark = self._mark(step)
        return mark.is_file() and all((self.folder / name).is_file() for name in read_json(mark)["sha256"])

    def _mark(self, step: str) -> Path:
        return self.folder / "steps" / f"{step}.json"

    def _name(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def resume(copy: RoundMirror, folder: RoundFolder, first_attempt: bool) -> None:
    """Before a round's steps: take up what any machine has done of it. Where the images of its data set are missing on
    this machine, that step is done again: it fetches them.

    Raises:
        ArtifactsUnavailable: the bucket does not answer.
    """
    if first_attempt:
        copy.forget()
    elif "dataset" in copy.take_up(folder) and not folder.is_done("infer") and not _has_images(folder):
        folder.undo(["dataset"])


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
