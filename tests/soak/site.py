"""What the soak runs on: a real Label Studio, proxies, a Redis, the service and two workers under their launcher."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import threading
from pathlib import Path

import psutil
import requests

from ppal_backend.datasets.ground_truth import read_user_coco
from ppal_backend.demo.run import label_config_of
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.connection import ModelConnection, connect_backend
from ppal_backend.launcher import GUNICORN, WORKER, Group
from ppal_backend.rig.label_studio_server import LabelStudioServer, free_port
from ppal_backend.rig.servers import RedisServer
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store
from ppal_backend.synthetic.scenes import generate
from tests.servers import wait_for
from tests.soak.proxy import Proxy

ROOT = Path(__file__).parents[2]
MARK = "PPAL_SOAK_MARK"
USER, PASSWORD = "soak", "soak password"
WORKERS = ("worker-1", "worker-2")


class LabelStudio(LabelStudioServer):
    """A Label Studio that can be stopped and started again with the same port, data and token."""

    def go_down(self, hard: bool) -> None:
        process = self._process
        if hard and process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        session, self._session = self._session, None  # stop() closes it; its token goes on
        self.stop()
        self._session = session

    def come_back(self) -> None:
        self._launch(int(self.url.rsplit(":", 1)[1]))
        self._wait_until_healthy(may_move=False)


class Site:
    """Everything, started; ``stop()`` ends it. ``projects`` holds their ids, ``truths`` the answers by task, also of
    deleted ones."""

    def __init__(self, out: Path, seed: int, images: int, budget: int, iterations: int) -> None:
        self.out, self.mark = out, secrets.token_hex(8)
        self.temporary = out / "tmp"
        shutil.rmtree(out, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self._stop = threading.Event()
        self.redis = self._redis()
        template = load_settings().cache_dir / "label-studio"
        binary = ROOT / ".venv-label-studio" / "bin" / "label-studio"
        self.label_studio = LabelStudio(
            binary, out / "label-studio", port=free_port(), template_cache=template, start_timeout_s=600.0
        )
        self.label_studio.start()
        self.port = free_port()
        self.to_label_studio = Proxy(int(self.label_studio.url.rsplit(":", 1)[1]), seed)
        self.to_service = Proxy(self.port, seed + 1)
        self.settings = load_settings(MODEL_DIR=out / "data-dir")
        self.store = open_store(self.settings)
        self.client = LabelStudioClient(self.label_studio.url, self.label_studio.token)
        commands = {"service": GUNICORN, **dict.fromkeys(WORKERS, WORKER)}
        self.group = Group(commands, self._environment(budget, iterations))
        self._thread = threading.Thread(target=self.group.run, args=(self._stop,), name="launcher")
        self._thread.start()
        wait_for(lambda: len(self.group.processes) == 3 and self.is_up(), "the service answers", 600)
        self.truths, self._deleted = {}, {}
        truth = read_user_coco(generate(out / "data", images=images, seed=seed))
        self.projects = [self._project(f"soak {n}", truth) for n in (1, 2)]

    def _redis(self) -> RedisServer | None:
        if shutil.which("redis-server") is None:
            return None
        server = RedisServer(self.out / "redis", free_port(), "queue-password", self.out / "redis.log", durable=False)
        server.start()
        return server

    def _environment(self, budget: int, iterations: int) -> dict[str, str]:
        """Of service, workers and rounds, and of nothing else."""
        return {
            MARK: self.mark,
            "MODEL_DIR": str(self.settings.model_dir),
            "TMPDIR": str(self.temporary),
            "LABEL_STUDIO_URL": self.to_label_studio.url,
            "LABEL_STUDIO_API_KEY": self.label_studio.token,
            "BASIC_AUTH_USER": USER,
            "BASIC_AUTH_PASS": PASSWORD,
            "PPAL_HOST": "127.0.0.1",
            "PPAL_PORT": str(self.port),
            "PPAL_PUBLIC_URL": self.to_service.url,
            "PPAL_QUEUE_URL": self.redis.url if self.redis else "",
            "START_TRAINING_EACH_N_UPDATES": str(budget),
            "PPAL_DETECTOR": "retinanet_tiny",
            "PPAL_MAX_ITERATIONS": str(iterations),
            "PPAL_POLL_INTERVAL_S": "10",
            "PPAL_MIN_FREE_GIB": "0.1",
            "DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    def _project(self, title: str, truth) -> int:
        project_id = self.label_studio.create_project(title, label_config_of(truth.labels))
        tasks = self.label_studio.import_images(project_id, list(truth.paths().values()))
        by_path = truth.truths_by_path()
        self.truths[project_id] = {task: by_path[path] for task, path in tasks.items()}
        self._deleted[project_id] = set()
        connect_backend(self.client, project_id, ModelConnection(self.to_service.url, user=USER, password=PASSWORD))
        return project_id

    def is_up(self) -> bool:
        return requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).ok

    def ours(self) -> list[psutil.Process]:
        """Every living process of service, workers and rounds: what carries this site's mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def start_training(self, project_id: int) -> None:
        """What Label Studio's button Start Training does."""
        rows = self.label_studio.session.get("/api/ml", params={"project": project_id})
        self.label_studio.session.post(f"/api/ml/{rows[0]['id']}/train", json={})

    def tasks(self, project_id: int) -> set[int]:
        """The tasks that are there, deleted ones left out."""
        return set(self.truths[project_id]) - self._deleted[project_id]

    def delete_tasks(self, project_id: int, task_ids: list[int]) -> None:
        """What the Data Manager's "Delete Tasks" does."""
        self._deleted[project_id].update(task_ids)
        body = {"selectedItems": {"all": False, "included": task_ids}}
        query = {"project": project_id, "id": "delete_tasks"}
        self.label_studio.session.post("/api/dm/actions", params=query, json=body)

    def label_config(self, project_id: int) -> str:
        return str(self.label_studio.session.get(f"/api/projects/{project_id}/")["label_config"])

    def set_label_config(self, project_id: int, xml: str) -> None:
        self.label_studio.session.request("PATCH", f"/api/projects/{project_id}/", json={"label_config": xml})

    def problems(self, project_id: int) -> dict[str, str]:
        """What people are told about the project."""
        return self.store.projects.get(project_id).problems

    def stop_backend(self) -> None:
        """Service and workers, as SIGTERM ends them."""
        self._stop.set()
        self._thread.join()

    def stop(self) -> None:
        self.stop_backend()
        for proxy in (self.to_label_studio, self.to_service):
            proxy.close()
        self.label_studio.stop()
        if self.redis is not None:
            self.redis.stop()
        self.store.close()
        self.client.close()

    def write(self, name: str, value: object) -> Path:
        path = self.out / name
        path.write_text(json.dumps(value, indent=1, default=str) + "\n")
        return path
