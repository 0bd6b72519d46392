"""The one place that knows which label-studio-ml is installed, and whose server a request came through.

Version 1.0.9 and version 2 have a base class ``LabelStudioMLBase`` each, with different constructors and
helpers. ``adapt`` turns either into a class that is built as ``Base(project_id=…, label_config=…)``, calls
``setup()`` at the end of its construction and keeps texts by ``get``/``set``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask, abort, after_this_request, current_app, has_request_context, request

from ppal_backend.errors import PPALError, SettingsError
from ppal_backend.service import auth, http_errors
from ppal_backend.service.runtime import EXTENSION, default_runtime

DISTRIBUTION = "label-studio-ml"


def load() -> type:
    """The adapted base class of the installed label-studio-ml.

    Raises:
        SettingsError: it is not installed, or lacks a package that it needs.
    """
    major = _major()
    try:
        with _without_torch_for(major):
            module = importlib.import_module("label_studio_ml.model")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("label_studio_ml"):
            advice = f"pip install --no-deps {DISTRIBUTION}==1.0.9; by its own pins it would bring a Flask of 2020"
        else:
            advice = f"pip install {error.name}, which {DISTRIBUTION} imports"
        raise SettingsError(f"expected {DISTRIBUTION} to be installed, got no module {error.name}: {advice}") from error
    if major >= 2:
        prepare_server(importlib.import_module("label_studio_ml.api")._server)
    return adapt(module.LabelStudioMLBase)


def prepare_server(app: Flask) -> None:
    """Make version 2's own server, one object of its module, take the webhook's token beside Basic authentication."""
    auth.install_before(app, lambda: default_runtime().settings)


def is_foreign_request(path: str = "") -> bool:
    """Whether a request is served now, to ``path`` if one is given, by another app than ours."""
    return has_request_context() and EXTENSION not in current_app.extensions and path in ("", request.path)


@contextmanager
def answering() -> Iterator[None]:
    """Version 2's server makes every exception a 500 with its traceback: expected errors keep status and text."""
    try:
        yield
    except PPALError as error:
        if is_foreign_request():
            refusal = http_errors.answer(str(error), http_errors.status_of(error))
            after_this_request(lambda response: refusal)
            abort(refusal)
        raise


def adapt(base: Any) -> type:
    """``base`` with version 2's constructor and helpers; a version 2 class is returned as it is."""
    if "project_id" in inspect.signature(base.__init__).parameters:
        return base
    return _with_version_2_interface(base)


def _with_version_2_interface(base: Any) -> type:
    class Version1Base(base):
        """Version 1's base class, built the way version 2's is."""

        def __init__(self, project_id: str | None = None, label_config: str | None = None) -> None:
            # Version 1 parses the config with entities switched on, so it does not get to see it.
            super().__init__(label_config=None)
            self.project_id = project_id or ""
            self.label_config = label_config
            self._kept: dict[str, Any] = {}
            self.setup()

        def setup(self) -> None:
            """Called at the end of the construction."""

        def get(self, key: str) -> Any:
            """The value kept under ``key``, or None."""
            return self._kept.get(key)

        def set(self, key: str, value: Any) -> None:
            """Keep a value for as long as this object lives."""
            self._kept[key] = value

        def has(self, key: str) -> bool:
            """Whether something is kept under ``key``."""
            return key in self._kept

        def set_extra_params(self, extra_params: Any) -> None:
            """Keep the extra parameters of the model connection."""
            self.set("extra_params", extra_params)

    return Version1Base


def _major() -> int:
    try:
        return int(importlib.metadata.version(DISTRIBUTION).split(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 0


@contextmanager
def _without_torch_for(major: int) -> Iterator[None]:
    """Hide torch while version 1 is imported.

    It takes torch only to start training processes, which this backend does elsewhere; without it the
    service starts in a second instead of several and stays below 100 MB.
    """
    hidden = major == 1 and "torch" not in sys.modules and "label_studio_ml.model" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]
