"""The export of annotated tasks: streamed to a file, then read item by item."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ijson

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.files import atomic_file
from ppal_backend.label_studio.transport import Transport

EXPORT_TIMEOUT_S = 1800.0
_IDS_PER_REQUEST = 200
_CHUNK = 1 << 16


def download(transport: Transport, project_id: int, path: Path, task_ids: Sequence[int] | None = None) -> Path:
    """Write Label Studio's JSON export to ``path``, atomically; memory use does not grow with its size.

    Args:
        transport: Connection to Label Studio.
        project_id: Project.
        path: File to write; replaced only by a complete export.
        task_ids: At most 200 task ids to limit the export to, or None for every task with an annotation.

    Returns:
        ``path``. A project without annotations gives a file holding ``[]``.

    Raises:
        LabelStudioUnavailable: Label Studio stayed unreachable over all tries.
        LabelStudioError: It refused, or the answer is no list of tasks.
    """
    params: dict[str, Any] = {"exportType": "JSON"}
    if task_ids is not None:
        params["ids[]"] = list(task_ids)

    def attempt() -> Path:
        with atomic_file(path) as file:
            route = f"/api/projects/{project_id}/export"
            with transport.stream(route, params, timeout_s=EXPORT_TIMEOUT_S) as response:
                _check_is_list(response.headers.get("content-type", ""))
                end = b""
                for chunk in response.iter_bytes(_CHUNK):
                    file.write(chunk)
                    end = (end + chunk)[-8:]
            if not end.rstrip().endswith(b"]"):
                raise LabelStudioUnavailable("expected a complete export, got a cut-off one; try again")
        return path

    return transport.repeat(attempt)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the tasks of an export file one by one, without holding the others.

    Raises:
        LabelStudioError: The file is cut off or is no list of tasks.
    """
    with path.open("rb") as file:
        try:
            yield from ijson.items(file, "item", use_float=True)
        except ijson.JSONError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LabelStudioError(
                f"expected a complete JSON export in {path.name}, got a broken one ({reason}); export again"
            ) from None


def stream(transport: Transport, project_id: int, task_ids: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield exported tasks through a temporary file (see :func:`download`); any number of ``task_ids``."""
    if task_ids is None:
        groups: list[Sequence[int] | None] = [None]
    else:
        ids = list(dict.fromkeys(task_ids))
        groups = [ids[i : i + _IDS_PER_REQUEST] for i in range(0, len(ids), _IDS_PER_REQUEST)]
    with tempfile.TemporaryDirectory(prefix="ppal-export-") as folder:
        for group in groups:
            yield from read(download(transport, project_id, Path(folder) / "export.json", group))


def _check_is_list(content_type: str) -> None:
    if "html" in content_type:
        raise LabelStudioError("expected a JSON export, got a web page; check that LABEL_STUDIO_URL is Label Studio's")
