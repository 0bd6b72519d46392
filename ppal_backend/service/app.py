"""The web application: ``create_app()`` serves Label Studio's ML backend protocol."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flask import Flask, Response

from ppal_backend.service import auth, problems
from ppal_backend.service.dashboard import views as dashboard
from ppal_backend.service.notifier import Jobs
from ppal_backend.service.protocol import EXTENSION, routes
from ppal_backend.service.runtime import ImagesOf, Predictor, build_runtime
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import Store

if TYPE_CHECKING:
    from ppal_backend.label_studio.client import LabelStudioClient

log = logging.getLogger(__name__)

MIB = 1024 * 1024
LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    app.after_request(_with_safe_headers)
    app.extensions[EXTENSION] = build_runtime(settings, store, jobs, predictor, client, images)
    app.register_blueprint(routes)
    dashboard.install(app, app.extensions[EXTENSION])
    if not settings.label_studio_api_key.get_secret_value():
        log.warning("LABEL_STUDIO_API_KEY is not set: projects cannot connect until it is")
    if not auth.is_on(settings) and settings.host not in LOOPBACK:
        log.warning("BASIC_AUTH_USER is not set: whoever reaches %s:%d may use it", settings.host, settings.port)
    return app


def _with_safe_headers(response: Response) -> Response:
    """Browsers neither guess types nor run anything; a page that needs more sets its own policy."""
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    response.headers.setdefault("Cache-Control", "no-store")
    return response
