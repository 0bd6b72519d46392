"""The routes that Label Studio calls, and those that operators do."""

from __future__ import annotations

import logging

from flask import Blueprint, Response, current_app, jsonify, request

from ppal_backend.logs import log_context
from ppal_backend.service import metrics, payloads, readiness
from ppal_backend.service.backend import PPALBackend
from ppal_backend.service.problems import RequestError
from ppal_backend.service.runtime import EXTENSION, Runtime

log = logging.getLogger(__name__)

routes = Blueprint("label_studio", __name__)


def runtime() -> Runtime:
    """The runtime of the app that serves this request."""
    value: Runtime = current_app.extensions[EXTENSION]
    return value


@routes.get("/")
@routes.get("/health")
def health() -> dict[str, str]:
    """Alive: asks neither model, database nor Label Studio."""
    return {"status": "UP", "model_class": "PPALBackend"}


@routes.get("/ready")
def ready() -> tuple[Response, int]:
    """Ready to serve: 200, or 503 with what the database, the worker or the disk lacks."""
    found = readiness.problems(runtime().settings, runtime().store)
    well = not any(found.values())
    checks = {name: problem or "ok" for name, problem in found.items()}
    return jsonify(status="READY" if well else "NOT READY", checks=checks), 200 if well else 503


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
