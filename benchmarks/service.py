"""How fast the service answers, idle or beside a training round.

    python -m benchmarks.service [--load | --rank 20000] [--seconds 20] [--rate 20]

starts the service under gunicorn with its own configuration, on a free port and a temporary MODEL_DIR, sends
webhooks at a fixed rate (each at its own time, however slow the one before was, and over a connection of its
own, as Label Studio does) and probes ``/health`` beside them. With ``--load`` a detector is in training
meanwhile, as niced as in a round; with ``--rank`` a ranking round of so many images goes on (that of
:mod:`benchmarks.scale`, 55 KB of disk an image). Prints one JSON object; milliseconds as the caller sees them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pacing import Latency, latency
from ppal_backend.launcher import GUNICORN
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store

PROJECT = "7.1795336563"
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="Cat"/><Label value="Dog"/></RectangleLabels></View>'
)
START_WAIT_S = 60.0
SENDERS = 16


@dataclass(frozen=True)
class Report:
    """One run. ``lost`` = webhooks answered with 201 that are not in the database; ``failed`` = other answers."""

    load: bool
    ranked: int
    rate_per_s: float
    seconds: float
    webhook_ms: Latency
    health_ms: Latency
    setup_ms: Latency
    failed: int
    lost: int
    start_s: float
    memory_mib: float
    load_average: float


def run(load: bool = False, seconds: float = 20.0, rate_per_s: float = 20.0, rank: int = 0) -> Report:
    """Measure once, beside a training or the ranking of ``rank`` images.

    Raises:
        RuntimeError: the service did not start.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = time.perf_counter()
        port, process = stack.enter_context(service(folder))
        start_s = time.perf_counter() - started
        call(port, "POST", "/setup", _setup())
        if load:
            stack.enter_context(training(folder))
        if rank:
            stack.enter_context(ranking(folder / "ranked", rank))
        webhooks, health = _both(port, seconds, rate_per_s)
        setups = [_timed(port, "POST", "/setup", _setup()) for _ in range(50)]
        good = sum(1 for status, _ in webhooks if status == 201)
        return Report(
            load=load,
            ranked=rank,
            rate_per_s=rate_per_s,
            seconds=seconds,
            webhook_ms=latency(webhooks),
            health_ms=latency(health),
            setup_ms=latency(setups),
            failed=len(webhooks) - good + sum(1 for status, _ in [*health, *setups] if status != 200),
            lost=good - _stored(folder),
            start_s=round(start_s, 2),
            memory_mib=round(family_mib(process.pid), 1),
            load_average=round(os.getloadavg()[0], 1),
        )


@contextmanager
def service(folder: Path, **environment: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The service under gunicorn with its state in ``folder``: its port and process."""
    port = _free_port()
    variables = {
        "MODEL_DIR": str(folder),
        "PPAL_HOST": "127.0.0.1",
        "PPAL_PORT": str(port),
        "LABEL_STUDIO_API_KEY": "none",
        "LABEL_STUDIO_URL": "http://127.0.0.1:9",
        "LOG_LEVEL": "WARNING",
    }
    process = subprocess.Popen(GUNICORN, env={**os.environ, **variables, **environment})
    try:
        _wait_for(port, process)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


def training(folder: Path) -> AbstractContextManager[None]:
    """A detector in training beside the block; the block starts after its first step."""
    return _beside(["-m", "benchmarks.service", "--train", str(folder)], "training")


def ranking(folder: Path, images: int) -> AbstractContextManager[None]:
    """A ranking round beside the block, as niced as a round's process."""
    folder.mkdir()
    return _beside(["-m", "benchmarks.service", "--rank", str(images), "--ranked", str(folder)], "ranking")


@contextmanager
def _beside(arguments: Sequence[str], told: str) -> Iterator[None]:
    """A Python process beside the block, which starts when the process has printed ``told``.

    Raises:
        RuntimeError: It did not start, or ended before the block.
    """
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or process.stdout.readline() != f"{told}\n":
            raise RuntimeError(f"the {told} did not start (exit code {process.wait()})")
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the {told} ended during the measurement")
    finally:
        process.kill()
        process.wait()


def rank_once(images: int, folder: Path) -> None:
    """A ranking round, as niced as a round's process; prints "ranking" before it begins."""
    os.nice(5)
    from benchmarks.scale import measure

    sys.stdout.write("ranking\n")
    sys.stdout.flush()
    measure(images, folder)


def train_until_killed(folder: Path) -> None:
    """Train retinanet_tiny on generated images, as niced as a round; prints "training" when the first step is done."""
    from ppal_backend.engines.local import yield_while_waiting

    yield_while_waiting()
    os.nice(5)  # as a round's process
    from ppal_backend.datasets.coco import CocoDataset
    from ppal_backend.datasets.ground_truth import read_user_coco
    from ppal_backend.detector.train.training import TrainRequest, train
    from ppal_backend.synthetic.scenes import generate

    dataset: CocoDataset = read_user_coco(generate(folder / "data", images=80)).dataset
    train_json = dataset.write(folder / "train.json")
    told = False

    def on_progress(_progress: object) -> None:
        nonlocal told
        if not told:
            told = True
            sys.stdout.write("training\n")
            sys.stdout.flush()

    while True:
        work_dir = folder / f"training-{os.urandom(3).hex()}"
        train(TrainRequest("retinanet_tiny", dataset.labels, train_json, None, work_dir), on_progress)


def call(port: int, method: str, path: str, body: Any = None) -> int:
    """One request over a connection of its own; the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def _both(port: int, seconds: float, rate_per_s: float) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Webhooks at ``rate_per_s`` and, beside them, five health probes a second."""
    health: list[tuple[int, float]] = []

    def probe() -> None:
        health.extend(_paced(seconds, 5.0, lambda n: _timed(port, "GET", "/health")))

    prober = threading.Thread(target=probe)
    prober.start()
    webhooks = _paced(seconds, rate_per_s, lambda n: _timed(port, "POST", "/webhook", annotation_payload(n + 1)))
    prober.join()
    return webhooks, health


def _paced(seconds: float, rate_per_s: float, send: Callable[[int], tuple[int, float]]) -> list[tuple[int, float]]:
    """Send at fixed times, whether the answers before have come or not."""
    start = time.perf_counter()
    with ThreadPoolExecutor(SENDERS) as pool:
        pending = []
        for number in range(round(seconds * rate_per_s)):
            time.sleep(max(0.0, start + number / rate_per_s - time.perf_counter()))
            pending.append(pool.submit(send, number))
        return [job.result() for job in pending]


def _timed(port: int, method: str, path: str, body: Any = None) -> tuple[int, float]:
    start = time.perf_counter()
    status = call(port, method, path, body)
    return status, time.perf_counter() - start


def annotation_payload(number: int, project_id: int = 7) -> dict[str, Any]:
    """What Label Studio sends when an annotation of ten boxes is submitted."""
    region = {
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "value": {"x": 1.0, "y": 2.0, "width": 30.0, "height": 40.0, "rotation": 0, "rectanglelabels": ["Cat"]},
    }
    return {
        "action": "ANNOTATION_CREATED",
        "annotation": {"id": number, "task": number, "was_cancelled": False, "result": [region] * 10},
        "task": {"id": number, "data": {"image": f"/data/upload/{project_id}/{number}.jpg"}},
        "project": {"id": project_id, "label_config": CONFIG},
    }


def _setup() -> dict[str, Any]:
    return {"project": PROJECT, "schema": CONFIG, "hostname": "http://localhost:8080", "extra_params": None}


def _stored(folder: Path) -> int:
    store = open_store(load_settings(MODEL_DIR=folder))
    try:
        return len(store.events.pending(7))
    finally:
        store.close()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_WAIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if call(port, "GET", "/health") == 200:
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the service did not start (exit code {process.poll()})")


def family_mib(pid: int) -> float:
    """Resident memory of a process and its children, in MiB."""
    import psutil

    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return float(sum(member.memory_info().rss for member in family)) / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="How fast the service answers.")
    parser.add_argument("--load", action="store_true", help="while a detector is in training")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=20.0, help="webhooks a second")
    parser.add_argument("--rank", type=int, default=0, help="while a round ranks so many images")
    parser.add_argument("--ranked", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train:
        train_until_killed(options.train)
    if options.ranked:
        rank_once(options.rank, options.ranked)
        return
    report = run(options.load, options.seconds, options.rate, options.rank)
    sys.stdout.write(json.dumps(asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
