"""Objects in a bucket, or in any other store that fsspec reaches: written with a check, read with a check."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ppal_backend.errors import ArtifactsUnavailable, DamagedArtifact, SettingsError
from ppal_backend.files import atomic_file, is_full, sha256_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

log = logging.getLogger(__name__)

TRIES = 3
WAIT_S = 1.0
PROBE = ".ppal-probe"
_CHUNK = 1 << 20
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
_CREDENTIALS = re.compile(r"://[^/\s]*@")
_TIMES = {"retries": {"max_attempts": 2}, "connect_timeout": 10, "read_timeout": 60}
_OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    "s3": {"use_listings_cache": False, "config_kwargs": _TIMES},
}
_T = TypeVar("_T")


class Bucket:
    """The objects under one address, by name.

    Every method raises:
        ArtifactsUnavailable: the bucket does not answer, or refuses; after ``TRIES`` tries.

    Args:
        url: such as ``s3://bucket/prefix``; credentials and endpoint come from the environment (``AWS_…``).
        sleep: replaces waiting (tests).

    Raises:
        SettingsError: the address is none, or the package for it is not installed.
    """

    def __init__(self, url: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self.name = url.rstrip("/")
        self._files, self._root = _opened(self.name)
        self._sleep = sleep

    def read(self, name: str) -> bytes | None:
        """A small object; None when there is none."""
        return self._repeat(f"give {name}", lambda: self._read(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a small object; it appears whole or not at all."""
        self._repeat(f"take {name}", lambda: self._files.pipe_file(self._path(name), data))

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self._files.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def upload(self, source: Path, name: str) -> None:
        """Copy a file to an object."""
        self._repeat(f"take {name}", lambda: self._upload(source, name))

    def _upload(self, source: Path, name: str) -> None:
        self._files.put_file(str(source), self._path(name))
        stored, wanted = self._files.size(self._path(name)), source.stat().st_size
        if stored != wanted:
            raise OSError(f"{stored} bytes of {wanted} were stored")

    def download(self, name: str, target: Path, sha256: str) -> None:
        """Copy an object to a file; once more when its content is not the one expected.

        Raises:
            DamagedArtifact: it is gone, or its content was another one both times.
        """
        for left in (1, 0):
            if self._repeat(f"give {name}", lambda: self._download(name, target, sha256)):
                return
            log.warning("%s in %s is not as it was written%s", name, self.name, "; fetched again" if left else "")
        raise DamagedArtifact(
            f"expected {name} in {self.name} as it was written (SHA-256 {sha256[:12]}…), got nothing or other content "
            "twice: the object is damaged; train again (ppal round PROJECT) or go back to another version"
        )

    def _download(self, name: str, target: Path, sha256: str) -> bool:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetched-") as folder:
            part = Path(folder) / target.name
            try:
                with self._files.open(self._path(name), "rb") as source, atomic_file(part) as file:
                    shutil.copyfileobj(source, file, _CHUNK)
            except FileNotFoundError:
                return False
            if sha256_of(part) != sha256:
                return False
            part.replace(target)
        return True

    def names(self, prefix: str) -> list[str]:
        """Every object below a prefix; none when there is no such prefix."""
        found = self._repeat(f"list {prefix}", lambda: self._files.find(self._path(prefix)))
        names = (str(path).removeprefix(f"{self._root}/") for path in found)
        return sorted(name for name in names if name.startswith(f"{prefix}/"))

    def delete(self, names: Collection[str]) -> None:
        """Delete objects; those that are gone already are no error."""
        for name in names:
            self._repeat(f"delete {name}", partial(self._delete, name))

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def check(self) -> None:
        """Write, read and delete an object.

        Raises:
            SettingsError: the bucket does not exist, or does not let us.
        """
        try:
            self._files.pipe_file(self._path(PROBE), b"ppal")
            self._files.cat_file(self._path(PROBE))
            self._delete(PROBE)
        except FileNotFoundError:
            raise SettingsError(
                f"expected a bucket at PPAL_ARTIFACTS={self.name}, got none; create it, or correct the address "
                "(and AWS_ENDPOINT_URL where it is not Amazon's)"
            ) from None
        except _errors() as error:
            if not isinstance(error, PermissionError) and type(error).__name__ not in _NO_CREDENTIALS:
                raise ArtifactsUnavailable(
                    f"expected {self.name} to answer, got {_reason(error)}; check that it is up and AWS_ENDPOINT_URL"
                ) from error
            raise SettingsError(
                f"expected to be let into PPAL_ARTIFACTS={self.name}, got {_reason(error)}; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY of somebody who may list, read, write and delete there"
            ) from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _repeat(self, what: str, call: Callable[[], _T]) -> _T:
        """Call, and again after a pause."""
        for attempt in range(1, TRIES + 1):
            try:
                return call()
            except _errors() as error:
                if is_full(error):
                    raise
                if attempt == TRIES:
                    raise ArtifactsUnavailable(
                        f"expected {self.name} to {what}, got {_reason(error)}, {TRIES} times; it is tried again, "
                        "check that the bucket is up and that the credentials in the environment are valid"
                    ) from error
                log.warning("%s did not %s: %s", self.name, what, _reason(error))
                self._sleep(WAIT_S * attempt)
        raise AssertionError("unreachable")


def _opened(url: str) -> tuple[AbstractFileSystem, str]:
    from fsspec.core import url_to_fs

    if "://" not in url:
        raise SettingsError(f"expected PPAL_ARTIFACTS such as s3://bucket/prefix, got {url!r}")
    scheme = url.split("://")[0]
    options = _OPTIONS.get(scheme, {})
    try:
        files, root = url_to_fs(url, **options)
    except ImportError as error:
        wanted = "install ppal-backend[s3]" if scheme == "s3" else "install that"
        raise SettingsError(f"PPAL_ARTIFACTS={url} needs a package that is not installed ({error}); {wanted}") from None
    except ValueError as error:
        raise SettingsError(f"expected PPAL_ARTIFACTS such as s3://bucket/prefix, got {url!r}: {error}") from None
    return files, str(root).rstrip("/")


def _errors() -> tuple[type[Exception], ...]:
    return (OSError, *_driver_errors())


def _driver_errors() -> Iterator[type[Exception]]:
    with suppress(ImportError):
        from botocore.exceptions import BotoCoreError, ClientError

        yield from (BotoCoreError, ClientError)
    with suppress(ImportError):
        from aiohttp import ClientError as HttpError

        yield HttpError


def _reason(error: BaseException) -> str:
    text = _CREDENTIALS.sub("://[credentials]@", " ".join(str(error).split()))[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
