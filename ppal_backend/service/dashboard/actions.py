"""What the buttons do: they write a wish into the store, the worker fulfils it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppal_backend.label_studio.source import open_client
from ppal_backend.operations import control
from ppal_backend.service.runtime import Runtime
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion

if TYPE_CHECKING:
    from ppal_backend.label_studio.client import LabelStudioClient

log = logging.getLogger(__name__)

ConnectTo = Callable[[Settings, str], "LabelStudioClient"]


@dataclass(frozen=True)
class Actions:
    """The buttons of one backend.

    Every method raises:
        StateError: the project's state does not allow it; the text says why.

    Args:
        runtime: what the service works with.
        connect_to: opens a Label Studio, for going back to a version.
    """

    runtime: Runtime
    connect_to: ConnectTo = open_client

    def train(self, project_id: int) -> str:
        """Ask for a training now; what was done, in a sentence."""
        record = self.runtime.store.rounds.request(project_id, "train", "training was asked for on the dashboard")
        self.runtime.notifier.notify(project_id)
        return f"Round {record.number} is asked for; a running worker takes it up within seconds."

    def cancel(self, project_id: int) -> str:
        """Stop the open rounds for good; the annotations that asked for one do not ask again."""
        cancelled = control.cancel(self.runtime.store, project_id)
        return f"Cancelled: round {', '.join(str(r.number) for r in cancelled)}."

    def pause(self, project_id: int) -> str:
        """Hold the project's rounds; the running one saves what it has and leaves."""
        control.pause(self.runtime.store, project_id)
        return "Paused: the running round stops at the next safe point, no other starts."

    def resume(self, project_id: int) -> str:
        """Let paused rounds go on."""
        control.resume(self.runtime.store, project_id)
        self.runtime.notifier.notify(project_id)
        return "Resumed."

    def roll_back(self, project_id: int, version: str) -> str:
        """Make an earlier version the one in force again."""
        from ppal_backend.operations.rollback import roll_back

        project = self.runtime.store.projects.get(project_id)
        with self.connect_to(self.runtime.settings, project.url) as client:
            done = roll_back(self.runtime.settings, self.runtime.store, client, project_id, version)
        log.info("project %d: went back to %s, as %s", project_id, version, done.version)
        again = f", published again as {done.version}" if done.published_again else ""
        return f"Version {version} is in force again{again}: {done.predictions} tasks."

    def earlier_versions(self, project_id: int) -> list[ModelVersion]:
        """Versions that can be gone back to, newest first."""
        from ppal_backend.operations.rollback import has_artifacts

        versions = reversed(self.runtime.store.versions.of_project(project_id))
        recent = self.runtime.settings.keep_versions
        return [
            v
            for i, v in enumerate(versions)
            if not v.active and (i < recent or has_artifacts(self.runtime.settings, v))
        ]
