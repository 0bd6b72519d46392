"""Whether the backend can do its work now: database, worker, disk."""

from __future__ import annotations

import logging
import shutil

from ppal_backend.errors import StateError, StoreUnavailable
from ppal_backend.settings import Settings
from ppal_backend.store import ALIVE_WITHIN_S, Store

log = logging.getLogger(__name__)

GIB = 1 << 30


def problems(settings: Settings, store: Store) -> dict[str, str]:
    """What hinders it: one entry for each check, empty where all is well."""
    return {"database": database(store), "worker": worker(store), "disk": disk(settings)}


def database(store: Store) -> str:
    """Whether the state database answers."""
    try:
        store.database.check()
    except Exception:
        log.exception("not ready: the state database does not answer")
        return "the state database does not answer; see the backend's log"
    return ""


def worker(store: Store) -> str:
    """Whether a worker has shown a sign of life."""
    try:
        age_s = store.workers.age_s()
    except (StateError, StoreUnavailable):
        return "nobody knows while the state database does not answer"
    if age_s is None:
        return "no worker runs on this state database; start ppal worker, or ppal up for both"
    if age_s > ALIVE_WITHIN_S:
        return f"no worker has shown a sign of life for {age_s:.0f} s; look at its log and start it again"
    return ""


def disk(settings: Settings) -> str:
    """Whether there is room for a round's files."""
    folder = settings.model_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free_gib = shutil.disk_usage(folder).free / GIB
    if free_gib < settings.min_free_gib:
        return f"only {free_gib:.2f} GiB are free for MODEL_DIR; make room, a round needs {settings.min_free_gib:g} GiB"
    return ""
