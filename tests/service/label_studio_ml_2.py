"""A double of label-studio-ml 2.0.1.dev0, which is on no package index: its base class and its Flask server.

It does what a run of the real one showed: unknown extra calls, traps and all. The server keeps its model class and its
credentials where the real module has globals.
"""

import json
import traceback

from flask import Flask, Response, jsonify, request

TRAIN_EVENTS = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED", "START_TRAINING")


class Version2Base:
    """The documented base class: a constructor by project, texts kept in a cache per project."""

    cache = {}  # noqa: RUF012

    def __init__(self, project_id=None, label_config=None):
        self.project_id = project_id or ""
        if label_config is not None:
            self.use_label_config(label_config)
        if not self.model_version:
            self.set("model_version", "0.0.1")
        self.setup()

    def setup(self):
        pass

    def use_label_config(self, label_config):
        self.set("label_config", label_config)

    def set_extra_params(self, extra_params):
        self.set("extra_params", extra_params)

    def get(self, key):
        return self.cache.get((self.project_id, key))

    def set(self, key, value):
        self.cache[self.project_id, key] = value

    def has(self, key):
        return (self.project_id, key) in self.cache

    @property
    def label_config(self):
        return self.get("label_config")

    @property
    def model_version(self):
        return self.get("model_version")

    def predict(self, tasks, context=None, **kwargs):
        raise NotImplementedError

    def fit(self, event, data, **additional_params):
        raise NotImplementedError


def server_of(model_class, basic_auth=None):
    """The server: every exception of ``/setup`` and ``/predict`` becomes a 500 that holds its traceback."""
    app = Flask("label_studio_ml.api")

    def with_traceback(view):
        def wrapped():
            try:
                return view()
            except Exception as error:  # noqa: BLE001
                body = {"detail": f"{type(error).__name__}: {error}", "result": {"traceback": traceback.format_exc()}}
                return jsonify(body), 500

        wrapped.__name__ = view.__name__
        return wrapped

    @app.before_request
    def check_auth():
        if basic_auth is None:
            return None
        given = request.authorization
        if not given or (given.username, given.password) != basic_auth:
            if given and given.username is None:  # a token is no Basic: compare_digest takes no None
                raise TypeError("unsupported operand types(s) or combination of types: 'NoneType' and 'str'")
            return Response("Unauthorized", 401, {"WWW-Authenticate": 'Basic realm="Login required"'})
        return None

    @app.post("/setup")
    @with_traceback
    def setup():
        data = request.json
        model = model_class(project_id=data["project"].split(".", 1)[0], label_config=data.get("schema"))
        if data.get("extra_params"):
            model.set_extra_params(data["extra_params"])
        return jsonify(model_version=model.get("model_version"))

    @app.post("/predict")
    @with_traceback
    def predict():
        data = request.json
        params = data.get("params", {})
        context = params.pop("context", {})
        model = model_class(project_id=str(data.get("project")).split(".", 1)[0], label_config=data.get("label_config"))
        return jsonify(results=model.predict(data.get("tasks"), context=context, **params))

    @app.post("/webhook")
    def webhook():
        data = request.json
        event = data.pop("action")
        if event not in TRAIN_EVENTS:
            return jsonify(status="Unknown event"), 200
        model = model_class(str(data["project"]["id"]), label_config=data["project"]["label_config"])
        return jsonify(json.loads(json.dumps({"result": model.fit(event, data), "status": "ok"}))), 201

    @app.get("/health")
    def health():
        return jsonify(status="UP", model_class=model_class.__name__)

    return app
