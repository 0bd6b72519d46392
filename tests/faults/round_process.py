"""``python -m tests.faults.round_process PROJECT``: a round with a fake detector, a real publisher and real state.

Files in the folder ``PPAL_RIG`` steer it: while ``hold-PROJECT-PLACE`` exists it waits at that place, having left its
process id in ``at-PROJECT-PLACE``. ``calls.log`` tells what was called by whom.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ppal_backend.errors import RoundCancelled, StoreUnavailable
from ppal_backend.label_studio.publish import LabelStudioPublisher
from ppal_backend.label_studio.source import open_client
from ppal_backend.logs import configure_logging
from ppal_backend.rounds import evaluation_set
from ppal_backend.rounds.ports import Ports
from ppal_backend.settings import load_settings
from ppal_backend.worker.round_process import run_next_round
from tests.rounds.fakes import FakeWorld

RIG = Path(os.environ["PPAL_RIG"])
_position = evaluation_set.position


def _of_any_project(project_key, task_id):
    """The same images measure the detector in every project, so that queues of two projects can be compared."""
    return _position("any", task_id)


evaluation_set.position = _of_any_project


class World(FakeWorld):
    """Source and engine; every call is told and may be held."""

    def __init__(self, project_id):
        super().__init__()
        self.project_id = project_id

    def _call(self, name):
        with (RIG / "calls.log").open("a") as log:
            log.write(f"{self.project_id} {name} {os.getpid()}\n")

    def place(self, name, should_stop=lambda: False):
        """A place where the process can be held."""
        hold = RIG / f"hold-{self.project_id}-{name}"
        if not hold.exists():
            return
        note = RIG / f"at-{self.project_id}-{name}"
        note.with_suffix(".part").write_text(str(os.getpid()))
        note.with_suffix(".part").rename(note)
        while hold.exists():
            if should_stop():
                raise RoundCancelled(f"stopped at {name}")
            time.sleep(0.02)

    def train(self, spec, labels, files, folder, on_progress, should_stop):
        self.place("training", should_stop)
        return super().train(spec, labels, files, folder, on_progress, should_stop)

    def infer(self, spec, model, images, on_progress, should_stop):
        for n, item in enumerate(super().infer(spec, model, images, on_progress, should_stop)):
            if n == 10:
                self.place("inferring", should_stop)
            yield item


class Observer:
    """The real observer, with places to hold at the beginning of every step."""

    def __init__(self, inner, world):
        self.inner, self.world = inner, world

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def step_started(self, step):
        self.inner.step_started(step)
        self.world.place(step)


class Publisher(LabelStudioPublisher):
    """The real publisher, with places to hold after each of its states is on disk."""

    world = None

    def publish(self, spec, model, queue, state, on_state):
        def told(new):
            on_state(new)
            self.world.place(f"publish-{new['state']}")

        self.world._call("publish")
        return super().publish(spec, model, queue, state, told)


def ports_of(settings, store, project, spec, observer):
    world = World(project.id)
    publisher = Publisher(open_client(settings, project.url), settings.keep_versions)
    publisher.world = world
    return Ports(world, world, publisher, Observer(observer, world))


if __name__ == "__main__":
    configure_logging(load_settings().log_level)
    try:
        run_next_round(load_settings(), int(sys.argv[1]), ports_of)
    except StoreUnavailable:
        sys.exit(1)
