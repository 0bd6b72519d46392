"""Real Ray nodes on this machine, and an engine without a detector whose steps they can run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from ppal_backend.engines.ray.node import LocalOptions
from ppal_backend.errors import DatasetError, RoundCancelled
from ppal_backend.files import atomic_file
from ppal_backend.structures.round import Progress

OBJECT_STORE = 100 * 2**20


@contextlib.contextmanager
def ray_cluster(head_cpus=1):
    """A cluster of a head, which is the node of this process."""
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        pytest.fail("Ray is not installed: run scripts/setup.sh ray (make test-all does)")
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster()
    add_node(cluster, head_cpus, include_dashboard=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster, cpus=1, **options):
    """A node more, on this machine."""
    return cluster.add_node(num_cpus=cpus, object_store_memory=OBJECT_STORE, **options)


def processes_of(node):
    """All processes of a node, its own and those that work on it."""
    own = [psutil.Process(info.process.pid) for group in node.all_processes.values() for info in group]
    return [child for process in own for child in process.children(recursive=True)] + own


def is_at(node, method):
    """Whether a process of the node is in this method right now; Ray says so in the process's name."""
    for process in processes_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            if f"ray::{method}" in " ".join(process.cmdline()):
                return True
    return False


def kill(cluster, node):
    """kill -9 of a node and of all that runs on it, as when its machine loses power; the moment."""
    everything = processes_of(node)
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(everything, timeout=10)
    cluster.worker_nodes.remove(node)
    return time.monotonic()


class CountingOptions(LocalOptions):
    """Makes an engine without a detector."""

    def engine(self):
        return CountingEngine()


class CountingEngine:
    """Its training counts steps in a file, and goes on from there."""

    def train(self, steps, folder, on_progress, should_stop):
        note = Path(folder) / "step"
        begun = int(note.read_text()) if note.exists() else 0
        for step in range(begun + 1, steps + 1):
            if should_stop():
                raise RoundCancelled(f"stopped before step {step}")
            with atomic_file(note) as file:  # a kill may come in the middle of it
                file.write(str(step).encode())
            on_progress(Progress("train", step, steps))
        return begun, os.getpid()

    def evaluate(self, said):
        raise DatasetError(said)

    def untrained(self):
        raise KeyError("bug")
