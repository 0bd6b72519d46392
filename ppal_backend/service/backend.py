"""``PPALBackend``: the model class that label-studio-ml's protocol speaks to.

Our own app builds it for every request; label-studio-ml 2's ``init_app(PPALBackend)`` can serve it as well.
It holds nothing: all state is in the store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ppal_backend.errors import StateError
from ppal_backend.service import connecting, events, ml_base, predicting
from ppal_backend.service.payloads import SetupBody
from ppal_backend.service.payloads import extra_params as read_extra_params
from ppal_backend.service.problems import RequestError
from ppal_backend.service.runtime import Runtime, default_runtime
from ppal_backend.store import ProjectRecord

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


class PPALModel(_Base):
    """All behaviour of ``PPALBackend``; mixed into whichever base class label-studio-ml provides.

    Args:
        project_id: Label Studio's project id as text.
        label_config: the project's labeling config; when given, an unknown project is connected with it.
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
        self.runtime = runtime or default_runtime()
        self._number = events.project_of({"project": project_id}) if project_id not in (None, "") else None
        self._given_config = label_config
        if label_config is not None:
            connecting.schema_of(label_config)  # refused here if it is unsafe, before the base class parses it
        super().__init__(str(self._number or ""), label_config)

    def setup(self) -> None:
        """Connect the project when the caller told its config; called by the base class when it is built."""
        if self._number is not None and self._given_config is not None:
            known = self.project
            options = known.options if known is not None else {}
            self.connect(SetupBody(self._number, str(self._number), self._given_config, "", options))

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
        connecting.connect(self.runtime, body)
        return self.model_version

    def set_extra_params(self, extra_params: Any) -> None:
        """Take over the extra parameters of the model connection (null, "", JSON text or an object)."""
        project = self._connected()
        overrides = read_extra_params(extra_params)
        connecting.connect(
            self.runtime, SetupBody(project.id, project.key, project.label_config, project.url, overrides)
        )
        text = extra_params if isinstance(extra_params, str) else json.dumps(overrides)
        self.set("extra_params", text)

    def predict(
        self, tasks: Sequence[Any], context: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """One prediction per task, in order; see :mod:`ppal_backend.service.predicting`."""
        with self.runtime.metrics.predicting():
            return predicting.predict(self.runtime, self.project, tasks)

    def fit(self, event: str, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Keep a webhook event and enqueue its handling. Training happens in the worker, never here.

        Returns:
            ``{"status": "stored", "event": id}`` or ``{"status": "ignored", "reason": text}``.

        Raises:
            RequestError: the payload lacks what the event always carries.
            StateError: the project is not connected.
        """
        parsed = events.parse({**data, "action": event})
        if isinstance(parsed, events.Ignored):
            return {"status": "ignored", "reason": parsed.reason}
        if self._number is not None and parsed.project_id != self._number:
            raise RequestError("the event is about another project than this model")
        projects = self.runtime.store.projects
        projects.need(parsed.project_id)
        if parsed.action == "PROJECT_UPDATED":
            known = projects.get(parsed.project_id).label_config
            if parsed.body["label_config"] in (None, known):
                return {"status": "ignored", "reason": "the labeling config is the one known already"}
        number = self.runtime.store.events.add(parsed.project_id, parsed.action, parsed.body)
        self.runtime.notifier.notify(parsed.project_id)
        return {"status": "stored", "event": number}

    def _connected(self) -> ProjectRecord:
        project = self.project
        if project is None:
            raise StateError(f"project {self._number} is not connected; build the model with its label_config first")
        return project


class PPALBackend(PPALModel, ml_base.load()):  # type: ignore[misc]
    """PPAL as a Label Studio ML backend."""
