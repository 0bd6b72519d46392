"""``PPALBackend``: the model class that label-studio-ml's protocol speaks to.

Our own app builds it for every request. label-studio-ml 2's ``init_app(PPALBackend)`` can serve it as well, with the
same answers: connecting, predictions, events, expected errors with their status and text, and Basic authentication
(BASIC_AUTH_USER and BASIC_AUTH_PASS in the environment) together with the webhook's token. Its server knows fewer
events; the worker's poll finds what the others would have told. The class holds nothing: all state is in the store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flask import request

from ppal_backend.detector.zoo import AUTO, find_entry
from ppal_backend.detector.zoo.choice import auto_order
from ppal_backend.errors import SettingsError, StateError
from ppal_backend.label_studio.schema import parse_label_config
from ppal_backend.logs import log_context
from ppal_backend.operations import detectors
from ppal_backend.service import auth, interactive, ml_base, payloads, predicting
from ppal_backend.service.http_errors import RequestError
from ppal_backend.service.payloads import SetupBody, is_loopback, read_json, setup_body
from ppal_backend.service.payloads import extra_params as read_extra_params
from ppal_backend.service.runtime import Runtime, default_runtime
from ppal_backend.settings import ProjectOptions, Settings
from ppal_backend.store import ProjectRecord
from ppal_backend.structures.round import RIVAL_NAMES, STRATEGY_NAMES

log = logging.getLogger(__name__)

if TYPE_CHECKING:

    class _Base:
        """What an adapted base class offers."""

        project_id: str

        def __init__(self, project_id: str | None = None, label_config: str | None = None) -> None: ...
        def get(self, key: str) -> Any: ...
        def set(self, key: str, value: Any) -> None: ...
else:
    _Base = object


def connect(runtime: Runtime, body: SetupBody) -> ProjectRecord:
    """Record the project as ``body`` describes it and enqueue its handling if anything is new.

    Raises:
        SettingsError: the API key or Label Studio's address is missing, or an extra parameter is wrong.
        LabelConfigError: the labeling config has no boxes on an image.
        UnknownDetector: the model zoo has no such detector; the text lists those it has.
        DetectorError: the detector that is named reads prompts, and two labels have the same.
        WeightsUnavailable: the initial weights of the detector that is named cannot be had here.
    """
    projects = runtime.store.projects
    known = projects.find(body.project_id)
    key = _key(body, known)
    url = label_studio_url(runtime.settings, body.hostname)
    before = None if known is None or known.key != key else _described(known)
    if before != (body.label_config, url, body.extra_params):
        options = checked_options(runtime.settings, body.extra_params)
        parse_label_config(body.label_config, options.from_name)
        detectors.check_prompts(runtime.settings, body.label_config, options)
        kept = {name: getattr(options, name) for name in body.extra_params}
        if before is None or before[2] != kept:
            detectors.check_named(runtime.settings, runtime.store, options)
            projects.set_problem(body.project_id, detectors.TOPIC, "")
        if before != (body.label_config, url, kept):
            new = projects.connect(body.project_id, key, body.label_config, url, kept)
            log.info("project %d %s", body.project_id, "connected" if new else "changed")
            runtime.notifier.notify(body.project_id)
    record = projects.get(body.project_id)
    if record.hostname == body.hostname:
        return record
    projects.set_hostname(record.id, body.hostname)
    return projects.get(record.id)


def label_studio_url(settings: Settings, hostname: str) -> str:
    """Where Label Studio is: as the operator set it, else as the caller says if the caller can be trusted.

    The API key is sent to this address, so a caller who proved nothing may only name this very machine.

    Raises:
        SettingsError: the key is not set, or the address has to be set.
    """
    if not settings.label_studio_api_key.get_secret_value():
        raise SettingsError(
            "expected LABEL_STUDIO_API_KEY in the backend's environment, got none; create a personal access token "
            "in Label Studio under Account & Settings and start the backend with it"
        )
    if settings.label_studio_url:
        return settings.label_studio_url
    if hostname and (is_loopback(hostname) or auth.is_on(settings)):
        return hostname
    raise SettingsError(
        f"expected LABEL_STUDIO_URL in the backend's environment, got none; Label Studio calls itself "
        f"{hostname!r}, which is taken as its address only when it is on this machine or BASIC_AUTH_USER is set"
    )


def checked_options(settings: Settings, overrides: dict[str, Any]) -> ProjectOptions:
    """The options in force, with a detector and a strategy that exist.

    Raises:
        SettingsError: an unknown or bad extra parameter, or an unknown strategy; the text lists the known ones.
        UnknownDetector: no such detector; the text lists those there are.
        DetectorError: ``auto``, and the zoo has no order to choose by.
    """
    options = settings.project_options(overrides)
    if options.detector == AUTO:
        auto_order(settings.model_zoo)
    else:
        find_entry(options.detector, settings.model_zoo)
    if options.strategy not in STRATEGY_NAMES:
        names = ", ".join(STRATEGY_NAMES)
        if options.strategy in RIVAL_NAMES:
            raise SettingsError(
                f"strategy {options.strategy!r} changes the detector and runs in simulations only (ppal simulate); "
                f"choose one of {names}"
            )
        raise SettingsError(f"expected a strategy of {names}; got {options.strategy!r}; choose one")
    return options


def _key(body: SetupBody, known: ProjectRecord | None) -> str:
    """The project's key; one without a creation time says nothing against the stored one, and vice versa."""
    if known is not None and ("." not in body.key or "." not in known.key):
        return known.key
    return body.key


def _described(record: ProjectRecord) -> tuple[str, str, dict[str, Any]]:
    return record.label_config, record.url, record.options


class PPALModel(_Base):
    """All behaviour of ``PPALBackend``; mixed into whichever base class label-studio-ml provides.

    Args:
        project_id: Label Studio's project id as text.
        label_config: the project's labeling config, which has to be usable. It connects nothing: only ``/setup`` does.
        runtime: what to work with; made from the environment when None.

    Raises:
        LabelConfigError: ``label_config`` has no boxes on an image.
        RequestError: ``project_id`` is no id.
    """

    def __init__(
        self,
        project_id: str | int | None = None,
        label_config: str | None = None,
        *,
        runtime: Runtime | None = None,
    ) -> None:
        with ml_base.answering():
            self.runtime = runtime or default_runtime()
            self._number = payloads.project_of({"project": project_id}) if project_id not in (None, "") else None
            if label_config is not None:
                parse_label_config(label_config)  # refused here if it is unsafe, before the base class parses it
            super().__init__(str(self._number or ""), label_config)

    def setup(self) -> None:
        """Connect the project when label-studio-ml's own server builds the model for ``/setup``.

        That server passes neither Label Studio's address on nor extra parameters that were cleared, so the request is
        read here as our own app reads it.
        """
        if ml_base.is_foreign_request("/setup"):
            self.connect(setup_body(read_json(request)))

    def get(self, key: str) -> Any:
        """A kept value; version 2's server asks for ``model_version`` this way."""
        return self.model_version if key == "model_version" else super().get(key)

    @property
    def project(self) -> ProjectRecord | None:
        """The project as stored, None when it never connected."""
        return None if self._number is None else self.runtime.store.projects.find(self._number)

    @property
    def model_version(self) -> str:
        """The version that the project's queue and predictions carry now."""
        if self._number is None:
            return predicting.UNTRAINED
        return predicting.version_of(self.runtime, self._number)

    def connect(self, body: SetupBody) -> str:
        """Record the project as Label Studio describes it; its model version.

        Raises:
            PPALError: a setting is missing, or the config or an extra parameter cannot be used.
        """
        connect(self.runtime, body)
        return self.model_version

    def set_extra_params(self, extra_params: Any) -> None:
        """Take over the extra parameters of the model connection (null, "", JSON text or an object)."""
        with ml_base.answering():
            project = self._connected()
            overrides = read_extra_params(extra_params)
            body = SetupBody(project.id, project.key, project.label_config, project.hostname or project.url, overrides)
            connect(self.runtime, body)
        text = extra_params if isinstance(extra_params, str) else json.dumps(overrides)
        self.set("extra_params", text)

    def predict(
        self, tasks: Sequence[Any], context: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """One prediction per task, in order; see :mod:`ppal_backend.service.predicting`.

        With a ``context`` somebody draws on the one task: see :mod:`ppal_backend.service.interactive`.
        """
        with ml_base.answering(), self.runtime.metrics.predicting():
            if context:
                result = interactive.answer(self.runtime, self.project, tasks, context)
                return [{**predicting.empty(1, self.model_version)[0], "result": result}]
            return predicting.predict(self.runtime, self.project, tasks)

    def fit(self, event: str, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Keep a webhook event and enqueue its handling. Training happens in the worker, never here.

        An event that cannot be used, whatever the reason, is ignored: Label Studio reads no answer, and switches a
        webhook off that is answered with errors.

        Returns:
            ``{"status": "stored", "event": id}`` or ``{"status": "ignored", "reason": text}``.

        Raises:
            StoreUnavailable: the state database does not answer.
        """
        with ml_base.answering():
            try:
                return self._keep_event(payloads.parse_event({**data, "action": event}))
            except (RequestError, StateError) as error:
                log.warning("an event was ignored: %s", error)
                return {"status": "ignored", "reason": str(error)}

    def _keep_event(self, event: payloads.Event | payloads.Ignored) -> dict[str, Any]:
        if isinstance(event, payloads.Ignored):
            return {"status": "ignored", "reason": event.reason}
        with log_context(project=event.project_id):
            if self._number not in (None, event.project_id):
                raise RequestError("the event is about another project than this model")
            if not auth.may_send_events_of(event.project_id):
                raise RequestError("this webhook's token belongs to another project")
            projects = self.runtime.store.projects
            projects.need(event.project_id)
            if event.action == "PROJECT_UPDATED":
                known = projects.get(event.project_id).label_config
                if event.body["label_config"] in (None, known):
                    return {"status": "ignored", "reason": "the labeling config is the one known already"}
            number = self.runtime.store.events.add(event.project_id, event.action, event.body)
            self.runtime.notifier.notify(event.project_id)
            return {"status": "stored", "event": number}

    def _connected(self) -> ProjectRecord:
        project = self.project
        if project is None:
            raise StateError(
                f"expected a connected project to set extra parameters of, got {self._number}; add this backend under "
                "Settings > Model of that project"
            )
        return project


class PPALBackend(PPALModel, ml_base.load()):  # type: ignore[misc]
    """PPAL as a Label Studio ML backend."""
