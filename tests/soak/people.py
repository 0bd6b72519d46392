"""Who uses it meanwhile: one annotator a project, and somebody who opens tasks that want a live prediction."""

from __future__ import annotations

import random
import threading
import time

import requests

from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.errors import LabelStudioError
from ppal_backend.rig.session import LabelStudioSession
from tests.soak.site import PASSWORD, USER

PAUSE_S = (3.0, 9.0)
LOOK_EVERY_S = 25.0


class Annotator(threading.Thread):
    """Works through the queue; now and then skips a task, corrects an annotation or deletes one.

    ``figures`` counts what was done, ``waits`` holds the seconds of every submit, ``refused`` the errors that a
    person would have seen.
    """

    def __init__(self, site, project_id: int, seed: int, pause_s: tuple[float, float] = PAUSE_S) -> None:
        super().__init__(name=f"annotator {project_id}", daemon=True)
        server = site.label_studio
        self.project_id, self._random, self._pause_s = project_id, random.Random(seed), pause_s
        self._scripted = ScriptedAnnotator(server.url, server.token, project_id, site.truths[project_id], timeout_s=60)
        self._session = LabelStudioSession(server.url, server.token, timeout_s=60)
        self._ended, self._mine = threading.Event(), []
        self.figures = dict.fromkeys(("submitted", "skipped", "corrected", "deleted", "queue_empty"), 0)
        self.waits, self.refused = [], []

    def run(self) -> None:
        while not self._ended.wait(self._random.uniform(*self._pause_s)):
            try:
                self._act()
            except LabelStudioError as error:
                self.refused.append(str(error)[:200])

    def finish(self) -> None:
        self._ended.set()
        self.join()
        self._scripted.close()
        self._session.close()

    def _act(self) -> None:
        dice = self._random.random()
        if dice < 0.05 and self._mine:
            self._session.request("DELETE", f"/api/annotations/{self._mine.pop()}/")
            self.figures["deleted"] += 1
        elif dice < 0.10 and self._mine:
            self._session.request("PATCH", f"/api/annotations/{self._mine[-1]}/", json={"result": []})
            self.figures["corrected"] += 1
        else:
            self._label(skip=dice > 0.95)

    def _label(self, skip: bool) -> None:
        started = time.monotonic()
        task = self._scripted.next_task()
        if task is None:
            self.figures["queue_empty"] += 1
        elif skip:
            body = {"result": [], "was_cancelled": True}
            self._session.post(f"/api/tasks/{task.task_id}/annotations/", json=body)
            self.figures["skipped"] += 1
        else:
            self._mine.append(self._scripted.submit(task))
            self.figures["submitted"] += 1
            self.waits.append(time.monotonic() - started)


class Visitor(threading.Thread):
    """Asks for live predictions of two tasks every while; ``figures`` counts the answers by status."""

    def __init__(self, site, seed: int, every_s: float = LOOK_EVERY_S) -> None:
        super().__init__(name="visitor", daemon=True)
        self._site, self._random, self._every_s = site, random.Random(seed), every_s
        self._ended, self.figures = threading.Event(), {}

    def run(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                outcome = str(self.look().status_code)
            except (requests.RequestException, LabelStudioError) as error:
                outcome = type(error).__name__
            self.figures[outcome] = self.figures.get(outcome, 0) + 1

    def look(self) -> requests.Response:
        project_id = self._random.choice(self._site.projects)
        stored = self._site.store.projects.get(project_id)
        tasks = self._random.sample(sorted(self._site.tasks(project_id)), 2)
        body = {
            "project": stored.key,
            "label_config": stored.label_config,
            "tasks": [self._site.client.transport.get(f"/api/tasks/{i}/", {"resolve_uri": "false"}) for i in tasks],
        }
        url = f"http://127.0.0.1:{self._site.port}/predict"
        return requests.post(url, json=body, auth=(USER, PASSWORD), timeout=110)

    def finish(self) -> None:
        self._ended.set()
        self.join()
