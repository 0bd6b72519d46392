"""The web application: ``create_app()`` serves Label Studio's ML backend protocol."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flask import Flask

from ppal_backend.service import auth, problems
from ppal_backend.service.notifier import Jobs
from ppal_backend.service.protocol import EXTENSION, routes
from ppal_backend.service.runtime import ImagesOf, Predictor, build_runtime
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import Store

if TYPE_CHECKING:
    from ppal_backend.label_studio.client import LabelStudioClient

log = logging.getLogger(__name__)

MIB = 1024 * 1024


def create_app(
    settings: Settings | None = None,
    store: Store | None = None,
    jobs: Jobs | None = None,
    predictor: Predictor | None = None,
    client: LabelStudioClient | None = None,
    images: ImagesOf | None = None,
) -> Flask:
    """The service as a WSGI application; no detector is loaded and Label Studio is not called.

    Args:
        settings: the operator's settings; from the environment when None.
        store: the state; opened by the settings when None.
        jobs: where work is enqueued (``sync(project_id)``); the job queue of the settings when None.
        predictor: where live predictions come from; a process started by the first one when None.
        client: the Label Studio to fetch images from; each project's own when None.
        images: where a project's images come from; fetched with the client when None.

    Raises:
        SettingsError: a setting is missing or contradicts another.
    """
    settings = settings or load_settings()
    app = Flask("ppal_backend")
    app.config["MAX_CONTENT_LENGTH"] = settings.max_request_mib * MIB
    problems.install(app)
    auth.install(app, settings)
    app.extensions[EXTENSION] = build_runtime(settings, store, jobs, predictor, client, images)
    app.register_blueprint(routes)
    if not settings.label_studio_api_key.get_secret_value():
        log.warning("LABEL_STUDIO_API_KEY is not set: projects cannot connect until it is")
    return app
