"""Initial weights on disk: downloaded, or put in place from a file, and kept only when the checksum is right.

Downloads are made by one process at a time. One that was cut off stays beside its target as ``NAME.part`` and goes on
from there next time.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ppal_backend.detector.zoo import Weights, ZooEntry
from ppal_backend.errors import WeightsUnavailable
from ppal_backend.files import atomic_file, sha256_of
from ppal_backend.structures.round import OnProgress, Progress

logger = logging.getLogger(__name__)

RANDOM = (
    "start at random (init_weights: random in the project's extra parameters, or PPAL_INIT_WEIGHTS=random; "
    "--init-weights random of ppal simulate), which needs many more images"
)

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0
_PARTIAL_CONTENT = 206
_RANGE_NOT_SATISFIABLE = 416


def default_weights_dir() -> Path:
    """Folder that keeps downloaded weights between runs."""
    return Path.home() / ".cache" / "ppal" / "weights"


def weights_target(entry: ZooEntry, weights_dir: Path | None = None) -> Path:
    """Where an entry's initial weights lie, or would lie after a download.

    Args:
        entry: Zoo entry with weights.
        weights_dir: Folder for downloads; :func:`default_weights_dir` when None.

    Raises:
        WeightsUnavailable: The entry has no weights.
    """
    return target_of(_weights_of(entry), weights_dir)


def target_of(weights: Weights, weights_dir: Path | None = None) -> Path:
    """Where a file of the zoo lies, or would lie after a download."""
    if weights.path is not None:
        return weights.path
    return (default_weights_dir() if weights_dir is None else Path(weights_dir)) / weights.file_name


def weights_file(entry: ZooEntry, weights_dir: Path | None = None, on_progress: OnProgress | None = None) -> Path:
    """Path of an entry's initial weights, downloaded and verified where needed.

    Args:
        entry: Zoo entry with weights.
        weights_dir: Folder for downloads; :func:`default_weights_dir` when None.
        on_progress: Called with ``Progress("fetch", bytes, all bytes)``; all bytes is 0 while unknown.

    Raises:
        WeightsUnavailable: The entry has no weights, the file is missing and cannot be downloaded, or its
            checksum is wrong. The message names the address and where to put the file by hand.
    """
    return _at_hand(entry, _weights_of(entry), weights_dir, on_progress)


def vocabulary_file(entry: ZooEntry, weights_dir: Path | None = None) -> Path:
    """Path of the vocabulary of a detector that reads prompts, downloaded and verified where needed.

    Args:
        entry: Zoo entry with a vocabulary.
        weights_dir: Folder for downloads; :func:`default_weights_dir` when None.

    Raises:
        WeightsUnavailable: Likewise as for weights.
    """
    if entry.vocabulary is None:
        raise WeightsUnavailable(f"{entry.name} has no vocabulary in the zoo; give its entry a table 'vocabulary'")
    return _at_hand(entry, entry.vocabulary, weights_dir, None)


def _at_hand(entry: ZooEntry, weights: Weights, weights_dir: Path | None, on_progress: OnProgress | None) -> Path:
    target, what = target_of(weights, weights_dir), described(weights)
    if target.is_file():
        verify(weights, target, entry.name)
    elif weights.file is not None:
        raise WeightsUnavailable(
            f"{what} of {entry.name} are missing: expected {target}, which no address is known for; get "
            f"{weights.file} ({weights.source}; sha256 {weights.sha256}) and run "
            f"{fetch_command(entry.name, weights_dir)}{_or_random(weights)}"
        )
    elif weights.url is None:
        raise WeightsUnavailable(
            f"{what} of {entry.name} are missing: expected {target}; "
            f"restore the file with {fetch_command(entry.name)} or make it again ({weights.source})"
        )
    else:
        _download(weights, target, fetch_command(entry.name, weights_dir), entry.name, on_progress)
    return target


def place_weights(entry: ZooEntry, source: Path, weights_dir: Path | None = None) -> Path:
    """Put a copy of a file where an entry's initial weights (or its vocabulary) belong, once its checksum is right.

    The copy is checked while it is made and appears whole or not at all; what lay there before stays until then.

    Args:
        entry: Zoo entry with weights.
        source: The file, which stays where it is.
        weights_dir: Folder for downloads; :func:`default_weights_dir` when None.

    Returns:
        Where the file lies now.

    Raises:
        WeightsUnavailable: The entry has no weights, the file cannot be read or is another one, or the copy cannot be
            written.
    """
    weights = _weights_of(entry)
    if entry.vocabulary is not None and source.is_file() and sha256_of(source) == entry.vocabulary.sha256:
        weights = entry.vocabulary
    target = target_of(weights, weights_dir)
    try:
        with source.open("rb") as stream, atomic_file(target) as copy:
            digest = hashlib.sha256()
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)
            wanted = weights.url or f"{weights.file_name}, {weights.source}"
            remedy = f"nothing was changed, give the file that the zoo means ({wanted})"
            _compare(weights, digest.hexdigest(), source, entry.name, remedy)
    except OSError as error:
        raise WeightsUnavailable(
            f"the initial weights of {entry.name} could not be copied from {source} to {target} ({error}); expected a "
            f"file that can be read and a folder that can be written: name others, or set their permissions"
        ) from error
    return target


def fetch_command(name: str, weights_dir: Path | None = None) -> str:
    """The command that puts a file in place of an entry's initial weights."""
    return f"ppal zoo fetch {name} --from FILE" + (f" --to {weights_dir}" if weights_dir is not None else "")


def described(weights: Weights) -> str:
    """What a file of the zoo is, in a sentence."""
    return "word pieces" if weights.kind == "vocabulary" else "initial weights"


def _or_random(weights: Weights) -> str:
    return "" if weights.kind == "vocabulary" else f", or {RANDOM}"


def _weights_of(entry: ZooEntry) -> Weights:
    if entry.weights is None:
        raise WeightsUnavailable(
            f"{entry.name} has no initial weights in the zoo; {RANDOM}, or put weights of your own in with ppal zoo add"
        )
    return entry.weights


def verify(weights: Weights, path: Path, name: str) -> None:
    """Check that a file is the one that the zoo means with these weights of the entry ``name``.

    Raises:
        WeightsUnavailable: It has another checksum.
    """
    remedy = f"download {weights.url} again" if weights.url else f"restore the file with {fetch_command(name)}"
    _compare(weights, sha256_of(path) if weights.sha256 else "", path, name, remedy)


def _compare(weights: Weights, actual: str, path: Path, name: str, remedy: str) -> None:
    if not actual.startswith(weights.sha256):
        raise WeightsUnavailable(
            f"{described(weights)} of {name} at {path} have sha256 {actual}, expected {weights.sha256}; {remedy}"
        )


def _download(weights: Weights, target: Path, by_hand: str, name: str, on_progress: OnProgress | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    what = described(weights)
    logger.info("downloading the %s of %s from %s", what, name, weights.url)
    try:
        with _locked(part) as stream:
            if target.is_file():  # another process had it ready while this one waited
                return
            _fill(stream, str(weights.url), on_progress)
            stream.flush()
            try:
                verify(weights, part, name)
            except WeightsUnavailable:
                part.unlink(missing_ok=True)
                raise
            part.replace(target)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise WeightsUnavailable(
            f"the {what} of {name} could not be downloaded from {weights.url} ({error}); try again, or "
            f"download that file where there is a network and put it at {target}, as {by_hand} does"
            f"{_or_random(weights)}"
        ) from error


@contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    """The unfinished file, open at its end, once no other process writes to it.

    Whoever had it before may have finished it or removed it, so that its name is free or another file's: then it is
    opened anew. It is removed only while it is locked, and when it stayed empty.
    """
    while True:
        with part.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_file_of(stream, part):
                continue
            try:
                yield stream
            finally:
                stream.flush()
                if _is_file_of(stream, part) and not part.stat().st_size:
                    part.unlink()
            return


def _is_file_of(stream: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _fill(stream: IO[bytes], url: str, on_progress: OnProgress | None) -> None:
    """Append what is missing; start again when the server cannot go on in the middle."""
    start = stream.seek(0, 2)
    try:
        answer = _open(url, start)
    except urllib.error.HTTPError as error:
        if error.code != _RANGE_NOT_SATISFIABLE or not start:
            raise
        stream.truncate(0)  # longer than the file on the server: not a part of it
        start, answer = 0, _open(url, 0)
    with answer:
        if getattr(answer, "status", None) != _PARTIAL_CONTENT:
            stream.truncate(0)
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else 0
        done = start
        while chunk := answer.read(_CHUNK):
            stream.write(chunk)
            done += len(chunk)
            if on_progress is not None:
                on_progress(Progress("fetch", done, max(total, done) if total else 0))
    if total and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")


def _open(url: str, start: int) -> Any:
    headers = {"Range": f"bytes={start}-"} if start else {}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
