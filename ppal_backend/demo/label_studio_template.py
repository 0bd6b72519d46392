"""A migrated, empty Label Studio database, kept by version: the first migration on SQLite takes half a minute."""

from __future__ import annotations

import fcntl
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ppal_backend.errors import LabelStudioUnavailable

logger = logging.getLogger(__name__)

DATABASE = "label_studio.sqlite3"


def copy_template(binary: Path, cache: Path, data_dir: Path, environment: Mapping[str, str]) -> None:
    """Give ``data_dir`` a migrated database unless it has one.

    Args:
        binary: The ``label-studio`` command.
        cache: Folder of the templates; filled when the version's template is missing.
        data_dir: Label Studio's data folder.
        environment: Environment of the command.

    Raises:
        LabelStudioUnavailable: The migration failed.
    """
    target = data_dir / DATABASE
    if target.exists():
        return
    template = prepare_template(binary, cache, environment)
    if template is None:
        return
    part = data_dir / f"{DATABASE}.part"
    shutil.copyfile(template, part)
    part.replace(target)


def prepare_template(binary: Path, cache: Path, environment: Mapping[str, str]) -> Path | None:
    """Make the template of this Label Studio's version unless there is one; processes wait for each other.

    Returns:
        Its path, or None when the version cannot be told.

    Raises:
        LabelStudioUnavailable: The migration failed.
    """
    version = installed_version(binary)
    if version is None:
        logger.info("no version of Label Studio found beside %s: no template", binary)
        return None
    cache.mkdir(parents=True, exist_ok=True)
    template = cache / f"label-studio-{version}.sqlite3"
    with (cache / f"label-studio-{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not template.exists():
            _migrate(binary, template, environment)
    return template


def installed_version(binary: Path) -> str | None:
    """Version of the Label Studio whose command this is; None when its metadata cannot be found."""
    found = sorted(binary.parent.parent.glob("lib/python*/site-packages/label_studio-*.dist-info"))
    return found[-1].name.removeprefix("label_studio-").removesuffix(".dist-info") if found else None


def _migrate(binary: Path, template: Path, environment: Mapping[str, str]) -> None:
    logger.info("migrating an empty Label Studio database; this takes about half a minute, once")
    with tempfile.TemporaryDirectory(prefix=".migrate.", dir=template.parent) as folder:
        variables = {**environment, "LABEL_STUDIO_BASE_DATA_DIR": folder}
        done = subprocess.run([str(binary), "version"], env=variables, cwd=folder, capture_output=True, check=False)
        database = Path(folder) / DATABASE
        if done.returncode != 0 or not database.exists():
            tail = (done.stdout + done.stderr).decode("utf-8", "replace")[-1500:]
            raise LabelStudioUnavailable(f"expected Label Studio to migrate, got exit code {done.returncode}\n{tail}")
        database.replace(template)
