"""Live prediction: a detector in a process of its own, so that the service never loads one.

The process starts with the first prediction and stays; it keeps the two models used last. If it dies it
is started once more for the same request. Requests are served one after another: the detector is the
bottleneck, and each caller waits no longer than it said.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from ppal_backend.engines.local import yield_while_waiting
from ppal_backend.errors import DetectorError, ImageError, PPALError
from ppal_backend.structures.detections import Detections

log = logging.getLogger(__name__)

MODELS_KEPT = 2
STARTS_PER_REQUEST = 2
STUCK_AFTER_S = 180.0
STOP_WAIT_S = 5.0

Image = tuple[int, str]
Runner = Callable[[Sequence[Image]], list[Detections]]


class PredictionTimeout(DetectorError):
    """No answer came within the time that the caller allowed."""


@dataclass(frozen=True)
class LiveModel:
    """A trained detector: its zoo name, checkpoint file and labels in class order."""

    detector: str
    checkpoint: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LiveOptions:
    """Where a detector runs: device, folder of the zoo (None = the packaged one), CPU threads (None = default)."""

    device: str = "auto"
    zoo: Path | None = None
    threads: int | None = None


Loader = Callable[[LiveModel, LiveOptions], Runner]


class LivePredictor:
    """Predicts boxes for single images while people wait.

    Args:
        options: where the detector runs.
        loader: builds the detector, inside the process; a module-level function.
        stuck_after_s: a process that has been at one request for so long is killed when the next one comes.
    """

    def __init__(
        self,
        options: LiveOptions | None = None,
        loader: Loader | None = None,
        stuck_after_s: float = STUCK_AFTER_S,
    ) -> None:
        self._options, self._loader = options or LiveOptions(), loader or load_detector
        self._stuck_after_s = stuck_after_s
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._asked_at: float | None = None  # when the request was sent that has no answer yet

    def predict(self, model: LiveModel, images: Sequence[Image], timeout_s: float) -> list[Detections]:
        """Boxes of each image, in pixels of the image.

        Args:
            model: which detector.
            images: image ids and files.
            timeout_s: how long the caller waits, for its turn and the loading of the model as well.

        Returns:
            One entry per image, without embeddings and probabilities; images that could not be read are
            missing. No images give an empty list.

        Raises:
            PredictionTimeout: no answer in time.
            PPALError: the detector said why it could not.
            DetectorError: the process died twice, or failed unexpectedly (the log has the traceback).
        """
        if not images:
            return []
        deadline = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            raise PredictionTimeout(f"the detector was busy for {timeout_s:.0f} s")
        try:
            return self._ask((model, list(images)), deadline)
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process. A later prediction starts a new one."""
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """Id of the process, None while there is none."""
        return self._process.pid if self._process is not None else None

    def _ask(self, request: tuple[LiveModel, list[Image]], deadline: float) -> list[Detections]:
        for attempt in range(1, STARTS_PER_REQUEST + 1):
            try:
                return _result(self._exchange(request, deadline))
            except (EOFError, OSError):
                code = self._stop()
                log.warning("the prediction process ended (exit code %s), attempt %d", code, attempt)
        raise DetectorError(
            "the prediction process ended twice while it worked on these images; it may lack memory, "
            "see the backend's log"
        )

    def _exchange(self, request: tuple[LiveModel, list[Image]], deadline: float) -> tuple[str, Any]:
        if self._asked_at is not None:
            self._await(deadline)  # the answer to a caller that gave up
        pipe = self._started()
        self._asked_at = time.monotonic()
        pipe.send(request)
        return self._await(deadline)

    def _await(self, deadline: float) -> tuple[str, Any]:
        assert self._pipe is not None and self._asked_at is not None
        if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            busy_s = time.monotonic() - self._asked_at
            if busy_s > self._stuck_after_s:
                log.error("the prediction process has not answered for %.0f s and is killed", busy_s)
                self._stop()
            raise PredictionTimeout("the detector did not answer in time")
        answer: tuple[str, Any] = self._pipe.recv()
        self._asked_at = None
        return answer

    def _started(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._loader, self._options), name="ppal-live", daemon=True
            )
            self._process.start()
            theirs.close()  # so that the pipe breaks when the process dies
        return self._pipe

    def _stop(self) -> int | None:
        """End the process, by force if need be; its exit code."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = self._asked_at = None
        if pipe is not None:
            pipe.close()
        if process is None:
            return None
        process.terminate()
        process.join(STOP_WAIT_S)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        return code


def _result(answer: tuple[str, Any]) -> list[Detections]:
    kind, value = answer
    if kind == "done":
        return list(value)
    if kind == "refused":
        raise value
    log.error("live prediction failed in its process:\n%s", value)
    raise DetectorError("live prediction failed unexpectedly; the backend's log has the details")


def _serve(pipe: Connection, loader: Loader, options: LiveOptions) -> None:
    """The process: answers requests until the other end of the pipe is gone."""
    yield_while_waiting()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the service decides
    models: OrderedDict[LiveModel, Runner] = OrderedDict()
    while True:
        try:
            model, images = pipe.recv()
        except EOFError:
            return
        answer = _answer(models, loader, options, model, images)
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def _answer(
    models: OrderedDict[LiveModel, Runner],
    loader: Loader,
    options: LiveOptions,
    model: LiveModel,
    images: Sequence[Image],
) -> tuple[str, Any]:
    try:
        if model not in models:
            while len(models) >= MODELS_KEPT:
                models.popitem(last=False)  # before loading, so that memory never holds one more
            models[model] = loader(model, options)
        models.move_to_end(model)
        return "done", [_slim(d) for d in models[model](images)]
    except PPALError as error:
        return "refused", _portable(error)
    except Exception:  # noqa: BLE001  (whatever it is, the caller is told and the process goes on)
        return "failed", traceback.format_exc()


def _portable(error: PPALError) -> PPALError:
    """The error without what it refers to, which may not fit through a pipe."""
    plain = DetectorError(str(error))
    kind = type(error)
    return kind(str(error)) if kind.__module__ == DetectorError.__module__ else plain


def _slim(detections: Detections) -> Detections:
    """Boxes, scores and classes only."""
    host = detections.numpy()
    return replace(
        host,
        embeddings=np.zeros((len(host), 0), np.float32),
        class_probs=None,
        levels=None,
        pre_nms_counts=None,
        true_positive=None,
    )


def _skip(image_id: int, error: ImageError) -> None:
    """An image that cannot be read yields no entry."""


def load_detector(model: LiveModel, options: LiveOptions) -> Runner:
    """The real loader; imports the detector libraries, so it is called inside the process only."""
    import torch

    from ppal_backend.detector.infer.inference import PoolImage, PoolInference

    if options.threads:
        torch.set_num_threads(options.threads)
    inference = PoolInference(model.detector, Path(model.checkpoint), model.labels, options.device, options.zoo)

    def run(images: Sequence[Image]) -> list[Detections]:
        pool = [PoolImage(image_id, path) for image_id, path in images]
        return list(inference.run(pool, on_error=_skip))

    return run
