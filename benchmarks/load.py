"""Load on a real Label Studio: webhooks and predictions while a round trains, and a project of 20,000 tasks.

    python -m benchmarks load [--json] [--quick]

A project of generated images is labelled a little and trained once, so that there is a model to predict with. Then a
second training goes on in the worker's round process while webhooks come in at fixed times with the project's token,
and while eight callers at once ask for predictions of 20 tasks each; milliseconds as the caller sees them, from the
time at which a request was due. :mod:`benchmarks.large_project` follows, and the figures are held against what is
asked for. ``--quick`` takes small sizes.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import select

from benchmarks import large_project
from benchmarks.pacing import Caller, Latency, closed_loop, latency, open_loop
from benchmarks.service import annotation_payload, family_mib
from ppal_backend.datasets.ground_truth import read_user_coco
from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.demo.run import label_config_of
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.connection import ModelConnection, connect_backend
from ppal_backend.rig.backend import Backend
from ppal_backend.rig.label_studio_server import LabelStudioServer
from ppal_backend.service.auth import webhook_token
from ppal_backend.settings import load_settings
from ppal_backend.store import Store
from ppal_backend.store.tables import EventRow
from ppal_backend.synthetic.scenes import generate

USER, PASSWORD = "bench", "bench password"
IMAGES, LABELLED, STEPS = 160, 40, 30
ENDLESS = 1_000_000
FIRST_ID = 1_000_000_000
SENDERS = 32
PREDICTING, TASKS, CALLS = 8, 20, 4
ROUND_TIMEOUT_S = 900.0
HANDLED_TIMEOUT_S = 900.0
WEBHOOK_P99_MS = 50.0
PUBLISH_RATIO = 1.3
LABEL_STUDIO = Path(".venv-label-studio/bin/label-studio")


@dataclass(frozen=True)
class Webhooks:
    """``lost``: sent, but not in the store. ``handled_s``: until the worker had handled the last one, after the end."""

    rate_per_s: float
    seconds: float
    ms: Latency
    refused: int
    lost: int
    twice: int
    handled_s: float | None
    trained_steps: int


@dataclass(frozen=True)
class Predictions:
    """``PREDICTING`` callers at once with ``TASKS`` tasks each; ``errors``: answers other than 200."""

    ms: Latency
    tasks_per_s: float
    errors: int
    training: bool


class Place:
    """Label Studio, backend, and a project whose model is trained."""

    def __init__(self, stack: ExitStack, folder: Path, images: int) -> None:
        template = load_settings().cache_dir / "label-studio"
        server = LabelStudioServer(LABEL_STUDIO, folder / "label-studio", template_cache=template)
        self.server = stack.enter_context(server)
        self.environment = {
            "BASIC_AUTH_USER": USER,
            "BASIC_AUTH_PASS": PASSWORD,
            "START_TRAINING_EACH_N_UPDATES": "100000",
            "PPAL_DETECTOR": "retinanet_tiny",
            "PPAL_MAX_ITERATIONS": str(STEPS),
            "PPAL_MIN_FREE_GIB": "0.1",
            "DEVICE": "cpu",
            "LOG_LEVEL": "WARNING",
        }
        self.backend = stack.enter_context(
            Backend(folder / "backend", self.server.url, self.server.token, self.environment)
        )
        self.store: Store = self.backend.store
        self.client = stack.enter_context(LabelStudioClient(self.server.url, self.server.token))
        self.project_id = self._project(folder, images)
        self.key = self.store.projects.get(self.project_id).key

    def _project(self, folder: Path, images: int) -> int:
        truth = read_user_coco(generate(folder / "data", images=images))
        project_id = self.server.create_project("load", label_config_of(truth.labels))
        tasks = self.server.import_images(project_id, list(truth.paths().values()))
        by_path = truth.truths_by_path()
        answers = {task: by_path[path] for task, path in tasks.items()}
        connect_backend(self.client, project_id, ModelConnection(self.backend.url, user=USER, password=PASSWORD))
        self.backend.wait_for_round(project_id, 1, ROUND_TIMEOUT_S)
        annotator = ScriptedAnnotator(self.server.url, self.server.token, project_id, answers)
        annotator.label(min(LABELLED, images // 2))
        annotator.close()
        self.store.rounds.request(project_id, "train", "a model to predict with")
        self.backend.wait_for_round(project_id, 2, ROUND_TIMEOUT_S)
        return project_id

    @contextmanager
    def training(self) -> Iterator[None]:
        """A training in the worker's round process, from its first step on until the block ends."""
        known = self.store.projects.get(self.project_id)
        self.store.projects.connect(
            known.id, known.key, known.label_config, known.url, {**known.options, "max_iterations": ENDLESS}
        )
        record = self.store.rounds.request(self.project_id, "train", "beside the measurement")
        self.backend.wait_until(lambda: self.trained_steps() > 0, ROUND_TIMEOUT_S, "the training's first step")
        yield
        if self.trained_steps() == 0:
            raise RuntimeError("the training ended during the measurement")
        self.store.rounds.ask_cancel(record.id)
        self.backend.wait_until(
            lambda: self.store.rounds.get(record.id).finished_at is not None, ROUND_TIMEOUT_S, "the training's end"
        )

    def trained_steps(self) -> int:
        """Steps of the training under way; 0 when there is none."""
        running = self.store.rounds.running(self.project_id)
        return 0 if running is None or running.step != "train" else int(running.progress.get("done", 0))

    def webhooks(self, seconds: float, rate_per_s: float) -> Webhooks:
        """Send webhooks while the training goes on, then look for each in the store."""
        count = round(seconds * rate_per_s)
        ids = range(FIRST_ID, FIRST_ID + count)
        bodies = [json.dumps(annotation_payload(i, self.project_id)).encode() for i in ids]
        settings = load_settings(basic_auth_user=USER, basic_auth_pass=PASSWORD)
        header = {"Authorization": f"Bearer {webhook_token(settings, self.project_id)}"}
        callers = [Caller(self.backend.port, header) for _ in range(SENDERS)]
        before = self.trained_steps()
        answers = open_loop(count, rate_per_s, SENDERS, lambda c, n: callers[c].post("/webhook", bodies[n]))
        steps, ended = self.trained_steps() - before, time.monotonic()
        for caller in callers:
            caller.close()
        stored = self._stored(ids)
        return Webhooks(
            rate_per_s=rate_per_s,
            seconds=seconds,
            ms=latency(answers),
            refused=sum(status != 201 for status, _ in answers),
            lost=len(set(ids) - set(stored)),
            twice=len(stored) - len(set(stored)),
            handled_s=self._handled(ended),
            trained_steps=steps,
        )

    def _stored(self, ids: range) -> list[int]:
        """The annotations that the stored events tell of, among ``ids``."""
        query = select(EventRow.body).where(EventRow.project_id == self.project_id)
        with self.store.database.reading() as session:
            told = [a["id"] for body in session.scalars(query) for a in body["annotations"]]
        return [i for i in told if i in ids]

    def _handled(self, since: float) -> float | None:
        """Seconds until no event was pending; None when that takes too long."""
        while self.store.events.counts().get("pending", 0):
            if time.monotonic() - since > HANDLED_TIMEOUT_S:
                return None
            time.sleep(0.2)
        return round(time.monotonic() - since, 1)

    def predictions(self, training: bool, calls: int = CALLS) -> Predictions:
        """``PREDICTING`` callers at once, each with tasks of its own."""
        config = self.store.projects.get(self.project_id).label_config
        tasks = [{"id": i, "data": data} for i, data in self.client.unlabelled_tasks(self.project_id)]
        batches = [[tasks[(start + n) % len(tasks)] for n in range(TASKS)] for start in range(0, PREDICTING * 7, 7)]
        body = {"project": self.key, "label_config": config, "params": {}}
        bodies = [json.dumps({**body, "tasks": batch}).encode() for batch in batches]
        coded = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        callers = [Caller(self.backend.port, {"Authorization": f"Basic {coded}"}) for _ in range(PREDICTING)]
        answers, seconds = closed_loop(PREDICTING, calls, lambda c, n: callers[c].post("/predict", bodies[c]))
        for caller in callers:
            caller.close()
        return Predictions(
            ms=latency(answers),
            tasks_per_s=round(TASKS * len(answers) / seconds, 1),
            errors=sum(status != 200 for status, _ in answers),
            training=training,
        )


def run(seconds: float = 60.0, rate_per_s: float = 200.0, images: int = IMAGES, calls: int = CALLS) -> dict[str, Any]:
    """Measure once.

    Raises:
        StateError: a round failed or took too long; the text ends with the backend's log.
    """
    with ExitStack() as stack:
        place = Place(stack, Path(stack.enter_context(tempfile.TemporaryDirectory())), images)
        place.predictions(training=False, calls=1)  # starts the detector's process, fetches the images
        idle = place.predictions(training=False, calls=calls)
        with place.training():
            webhooks = place.webhooks(seconds, rate_per_s)
            beside = place.predictions(training=True, calls=calls)
        service = place.backend.find("gunicorn")[0]
        return {
            "webhooks": asdict(webhooks),
            "predictions": [asdict(idle), asdict(beside)],
            "service_mib": round(family_mib(service.pid), 1),
            "load_average": os.getloadavg(),
            "cores": psutil.cpu_count(),
        }


def run_all(quick: bool = False) -> dict[str, Any]:
    """All figures, and whether each target is met."""
    loaded = run(5.0, 50.0, 60, 1) if quick else run()
    figures = {**loaded, **(large_project.run(500, 200) if quick else large_project.run())}
    webhooks = figures["webhooks"]
    targets = {
        "no webhook is lost": webhooks["lost"] == webhooks["refused"] == 0,
        f"webhook p99 < {WEBHOOK_P99_MS:.0f} ms": webhooks["ms"]["p99"] < WEBHOOK_P99_MS,
        "no prediction fails": not any(row["errors"] for row in figures["predictions"]),
        f"publishing <= {PUBLISH_RATIO} x a bare import": figures["publishing"]["ratio"] <= PUBLISH_RATIO,
    }
    return {"targets": targets, **figures}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    hooks, large, publishing = report["webhooks"], report["large"], report["publishing"]
    ms = hooks["ms"]
    lines = [
        f"{ms['count']} webhooks at {hooks['rate_per_s']:.0f}/s beside a training: p50 {ms['p50']} ms, "
        f"p99 {ms['p99']} ms, max {ms['max']} ms; refused {hooks['refused']}, lost {hooks['lost']}, "
        f"stored twice {hooks['twice']}; all handled {hooks['handled_s']} s after the last"
    ]
    for row in report["predictions"]:
        beside = "beside a training" if row["training"] else "idle"
        lines.append(
            f"{PREDICTING} callers, {TASKS} tasks each, {beside}: p50 {row['ms']['p50']} ms, "
            f"p99 {row['ms']['p99']} ms, {row['tasks_per_s']} tasks/s, errors {row['errors']}"
        )
    lines.append(f"{large['tasks']} tasks (imported in {large['imported_s']} s), {large['tasks_ranked']} ranked:")
    lines += ["| step | s | peak GiB |", "|---|---|---|"]
    lines += [f"| {step} | {s} | {large['peak_gib'][step]} |" for step, s in large["seconds"].items()]
    lines.append(
        f"publishing {publishing['tasks']} tasks of {publishing['boxes']} boxes: {publishing['publish_s']} s, a bare "
        f"import {publishing['bare_s']} s, ratio of the medians {publishing['ratio']}"
    )
    lines += [f"{'met' if met else 'MISSED'}: {target}" for target, met in report["targets"].items()]
    return "\n".join([*lines, f"load average {report['load_average'][0]:.1f}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Load on a real Label Studio.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args(arguments)
    report = run_all(options.quick)
    sys.stdout.write((json.dumps(report, indent=1) if options.json else table(report)) + "\n")


if __name__ == "__main__":
    main()
