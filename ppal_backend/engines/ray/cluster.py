"""The one place that starts or joins a Ray cluster, and asks what it has."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ppal_backend.errors import EngineUnavailable, PPALError, SettingsError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: Ray's id, its address, and how many CPU cores and GPUs it offers."""

    id: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Needs:
    """What one process in the cluster takes."""

    cpus: int
    gpus: int

    def fit(self, node: Node) -> bool:
        """Whether an idle node has as much."""
        return node.cpus >= self.cpus and node.gpus >= self.gpus

    def __str__(self) -> str:
        return f"{self.gpus} GPUs and {self.cpus} CPU cores" if self.gpus else f"{self.cpus} CPU cores"


def need_ray() -> None:
    """Tell what to install before anything begins.

    Raises:
        SettingsError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(
            "expected the package ray for PPAL_ENGINE=ray, found none; install it with "
            "`pip install --no-deps -r requirements-ray.txt`, or set PPAL_ENGINE=local"
        )


class RayCluster:
    """A connection to a cluster, made at the first use and kept for the life of this process.

    Args:
        address: ``host:port`` of the cluster's head, for a machine that is itself a node of the cluster; empty starts
            Ray on this machine alone, for as long as this process lives.

    Raises:
        SettingsError: Ray is not installed, or the address is one of Ray Client, which cannot be used here.
    """

    def __init__(self, address: str = "") -> None:
        need_ray()
        if "://" in address:
            raise SettingsError(
                f"expected RAY_ADDRESS as host:port, got {address!r}; run `ray start --address=host:port` on this "
                "machine, so that it is a node of the cluster, and give the same host:port"
            )
        self._address = address

    @property
    def ray(self) -> Any:
        """The module, connected.

        Raises:
            EngineUnavailable: The cluster does not answer.
        """
        import ray

        if not ray.is_initialized():
            self._connect(ray)
        return ray

    @property
    def home(self) -> str:
        """Id of the node that this process runs on; it sees all files of the round."""
        return str(self.ray.get_runtime_context().get_node_id())

    def nodes(self) -> list[Node]:
        """The machines that are there now."""
        found = [node for node in self.ray.nodes() if node["Alive"]]
        return [
            Node(node["NodeID"], node["NodeManagerHostname"], *(node["Resources"].get(k, 0) for k in ("CPU", "GPU")))
            for node in found
        ]

    def kind_of(self, device: str) -> str:
        """``cuda`` or ``cpu``: what ``DEVICE`` means in this cluster. Ray chooses among the GPUs itself."""
        if device == "auto":
            return "cuda" if any(node.gpus >= 1 for node in self.nodes()) else "cpu"
        return device.split(":")[0]

    def capable(self, needs: Needs) -> list[Node]:
        """The machines that are large enough.

        Raises:
            EngineUnavailable: There are none now; some may come, or come back.
        """
        nodes = self.nodes()
        large = [node for node in nodes if needs.fit(node)]
        if not large:
            offered = "; ".join(f"{node.host}: {node.gpus:g} GPUs, {node.cpus:g} cores" for node in nodes)
            raise EngineUnavailable(
                f"expected a node of the Ray cluster with {needs}, got {offered or 'no node'}; lower PPAL_GPUS or "
                "PPAL_THREADS, change DEVICE, or add a larger node"
            )
        return large

    def _connect(self, ray: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what its next versions do
        options: dict[str, Any] = {"address": self._address}
        if not self._address:
            options = {"address": "local", "include_dashboard": False}
        try:
            with _own_sigterm():
                ray.init(**options, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EngineUnavailable(
                f"expected a Ray cluster at {self._address or 'this machine'}, got no answer "
                f"({str(error).splitlines()[0]}); check RAY_ADDRESS, and that `ray start` ran on this machine"
            ) from error
        log.info("joined Ray %s: %s", ray.__version__, ", ".join(node.host for node in self.nodes()))


def on_node(node_id: str) -> Any:
    """Ray's scheduling strategy for "on this node and no other"."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)


@contextmanager
def translate_errors(ray: Any) -> Iterator[None]:
    """Errors that the other side raised on purpose arrive as they were raised there."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PPALError):
            raise error.cause from None
        raise


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray ends the process at SIGTERM; here that signal asks a round to stop after its step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
