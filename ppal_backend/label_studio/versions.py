"""Which of the stored versions Label Studio serves."""

from __future__ import annotations

from ppal_backend.errors import PublishError
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.queue import SAMPLING


def activate_version(client: LabelStudioClient, project_id: int, version: str) -> None:
    """Make a version whose predictions Label Studio still holds the project's queue again, in one request.

    Raises:
        PublishError: Label Studio did not take it.
    """
    client.patch_project(project_id, model_version=version, sampling=SAMPLING)
    project = client.project(project_id)
    if (project.get("model_version"), project.get("sampling")) != (version, SAMPLING):
        raise PublishError(
            f"expected model version {version!r} with {SAMPLING!r} after setting them, got "
            f"{project.get('model_version')!r} with {project.get('sampling')!r}; somebody changed the project's "
            "settings at the same time: try again"
        )
