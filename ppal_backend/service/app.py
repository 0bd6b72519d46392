"""The web application: ``create_app()`` serves Label Studio's ML backend protocol, operators' routes and the pages."""

from __future__ import annotations

import logging

from flask import Blueprint, Flask, Response, current_app, g, jsonify, redirect, request, url_for
from werkzeug.wrappers import Response as AnyResponse

from ppal_backend.logs import log_context
from ppal_backend.service import auth, http_errors, metrics, payloads, readiness
from ppal_backend.service.backend import PPALBackend
from ppal_backend.service.dashboard import views as dashboard
from ppal_backend.service.http_errors import RequestError
from ppal_backend.service.runtime import EXTENSION, ImagesOf, Jobs, Predictor, Runtime, build_runtime
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import Store

log = logging.getLogger(__name__)

MIB = 1024 * 1024
LOOPBACK = ("127.0.0.1", "localhost", "::1")

routes = Blueprint("label_studio", __name__)


def create_app(
    settings: Settings | None = None,
    store: Store | None = None,
    jobs: Jobs | None = None,
    predictor: Predictor | None = None,
    images: ImagesOf | None = None,
) -> Flask:
    """The service as a WSGI application; no detector is loaded and Label Studio is not called.

    Args:
        settings: the operator's settings; from the environment when None.
        store: the state; opened by the settings when None.
        jobs: where work is enqueued (``sync(project_id)``); the job queue of the settings when None.
        predictor: where live predictions come from; a process started by the first one when None.
        images: where a project's images come from; its own Label Studio when None.

    Raises:
        SettingsError: a setting is missing or contradicts another.
    """
    settings = settings or load_settings()
    app = Flask("ppal_backend")
    app.config["MAX_CONTENT_LENGTH"] = settings.max_request_mib * MIB
    http_errors.install(app)
    auth.install(app, settings)
    app.after_request(_with_safe_headers)
    app.extensions[EXTENSION] = build_runtime(settings, store, jobs, predictor, images)
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


def runtime() -> Runtime:
    """The runtime of the app that serves this request."""
    value: Runtime = current_app.extensions[EXTENSION]
    return value


@routes.get("/")
def root() -> dict[str, str] | AnyResponse:
    """Alive, as ``/health``; a browser is sent to the dashboard."""
    wants = request.accept_mimetypes
    if wants["text/html"] > wants["application/json"]:
        return redirect(url_for("ui.overview"))
    return health()


@routes.get("/health")
def health() -> dict[str, str]:
    """Alive: asks neither model, database nor Label Studio."""
    return {"status": "UP", "model_class": "PPALBackend"}


@routes.get("/ready")
def ready() -> tuple[Response, int]:
    """Ready to serve: 200, or 503 with what the database, the worker or the disk lacks.

    Probes need no credentials; without them the answer is the status alone.
    """
    found = readiness.problems(runtime().settings, runtime().store)
    well = not any(found.values())
    checks = {} if g.get("status_only") else {"checks": {name: problem or "ok" for name, problem in found.items()}}
    return jsonify(status="READY" if well else "NOT READY", **checks), 200 if well else 503


@routes.post("/setup")
def setup() -> dict[str, str]:
    """Connect a project; Label Studio calls this whenever it looks at the connection."""
    body = payloads.setup_body(payloads.read_json(request))
    model = PPALBackend(project_id=str(body.project_id), runtime=runtime())
    with log_context(project=body.project_id):
        return {"model_version": model.connect(body)}


@routes.post("/predict")
def predict() -> Response:
    """Pre-annotate tasks: exactly one result per task, in order."""
    body = payloads.predict_body(payloads.read_json(request))
    model = PPALBackend(project_id=str(body.project_id), runtime=runtime())
    slots = runtime().predict_slots
    if not slots.acquire(blocking=False):
        # An error rather than empty results: Label Studio would keep those and not ask again.
        raise RequestError("too many predictions are under way; try again later", status=503)
    try:
        with log_context(project=body.project_id):
            results = model.predict(body.tasks, context=body.context)
    finally:
        slots.release()
    return jsonify(results=results, model_version=model.model_version)


@routes.post("/webhook")
def webhook() -> tuple[Response, int]:
    """Keep an event; 201 when it is stored, 200 when there is nothing to do about it or it cannot be used.

    Label Studio switches a webhook off after 50 answers that are errors, whoever is to blame for them.
    """
    fields = payloads.read_json(request)
    action = fields.pop("action", None)
    runtime().metrics.webhook(action)
    if not isinstance(action, str):
        raise RequestError("expected the field 'action' with the name of a webhook event; send Label Studio's payload")
    answer = PPALBackend(runtime=runtime()).fit(action, fields)
    return jsonify(answer), 201 if answer["status"] == "stored" else 200


@routes.get("/versions")
def versions() -> dict[str, list[str]]:
    """Every model version, newest first."""
    return {"versions": runtime().store.versions.names()}


@routes.get("/metrics")
def prometheus() -> Response:
    """Metrics as Prometheus text."""
    return Response(runtime().metrics.text(), content_type=metrics.CONTENT_TYPE)
