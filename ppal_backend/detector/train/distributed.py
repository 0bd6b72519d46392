"""Several processes that train one detector together: each takes its share of every batch."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ppal_backend.detector.train.attempt import Attempt, ShouldStop, run_attempt
from ppal_backend.errors import DetectorError, PPALError
from ppal_backend.structures.round import OnProgress

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_END_WAIT_S = 5.0


def check_processes(processes: int, batch_size: int, device: torch.device) -> None:
    """Find out before anything is started whether so many processes can train.

    Raises:
        DetectorError: There are fewer GPUs, one GPU was named, or the batch does not divide evenly.
    """
    if processes == 1:
        return
    if device.type == "cuda" and (device.index is not None or torch.cuda.device_count() < processes):
        raise DetectorError(
            f"expected {processes} GPUs and a device of auto or cuda, got {torch.cuda.device_count()} GPUs and "
            f"{device}; lower PPAL_GPUS or change DEVICE"
        )
    if batch_size % processes:
        raise DetectorError(
            f"expected a batch size that {processes} processes can share evenly, got {batch_size}; change PPAL_GPUS"
        )


def run_in_processes(
    attempt: Attempt, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None
) -> None:
    """Like :func:`attempt.run_attempt`, in ``attempt.request.processes`` processes; only the first writes files.

    Gradients are averaged over gloo on CPUs and NCCL on GPUs. The processes end with this one, however it ends.

    Raises:
        PPALError: What the process that failed first said.
        DetectorError: A process died without a word.
    """
    count = attempt.request.processes
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    threads = max(1, torch.get_num_threads() // count)
    children: list[tuple[BaseProcess, Connection]] = []
    with tempfile.TemporaryDirectory(prefix="ppal-meeting-") as folder:
        try:
            for rank in range(count):
                mine, theirs = context.Pipe(duplex=False)
                arguments = (rank, count, attempt, str(Path(folder) / "store"), theirs, stop, threads)
                child: BaseProcess = context.Process(target=_child, args=arguments, name=f"ppal-train-{rank}")
                child.start()
                theirs.close()
                children.append((child, mine))
            _follow(children, on_progress, should_stop, stop.set)
            for child, _ in children:
                child.join(_END_WAIT_S)
        finally:
            for child, connection in children:
                _end(child)
                connection.close()


def _follow(
    children: list[tuple[BaseProcess, Connection]],
    on_progress: OnProgress | None,
    should_stop: ShouldStop | None,
    stop: Callable[[], None],
) -> None:
    """Pass on what the processes say until all are done."""
    open_ends = {connection: rank for rank, (_, connection) in enumerate(children)}
    while open_ends:
        if should_stop is not None and should_stop():
            stop()
        for ready in wait(list(open_ends), timeout=_POLL_S):
            assert isinstance(ready, Connection)
            try:
                kind, value = ready.recv()
            except EOFError:
                raise _reason(list(open_ends), ready) or _died(children, open_ends[ready]) from None
            if kind == "failed":
                raise value
            if kind == "done":
                del open_ends[ready]
            elif on_progress is not None:
                on_progress(value)


def _reason(open_ends: list[Connection], gone: Connection) -> PPALError | None:
    """What another process said before one died: those that wait for a process that has failed die of it."""
    for connection in open_ends:
        try:
            while connection is not gone and connection.poll():
                kind, value = connection.recv()
                if kind == "failed" and isinstance(value, PPALError):
                    return value
        except EOFError:
            continue
    return None


def _died(children: list[tuple[BaseProcess, Connection]], rank: int) -> DetectorError:
    process = children[rank][0]
    process.join(_END_WAIT_S)
    return DetectorError(
        f"training process {rank + 1} of {len(children)} ended with code {process.exitcode}; the log has its words"
    )


def _end(child: BaseProcess) -> None:
    """End a process that still runs, which may be waiting for one that has failed."""
    for act in (child.terminate, child.kill):
        if child.is_alive():
            act()
            child.join(_END_WAIT_S)


def _child(
    rank: int, count: int, attempt: Attempt, store: str, connection: Connection, stop: Any, threads: int
) -> None:
    """One of the processes, from start to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _leave_with_parent()
    warnings.filterwarnings("ignore", message=".*start method.*")  # mmengine chooses that of data loaders itself
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # torch before 2.13 has no other name for it
    torch.set_num_threads(threads)
    on_cuda = attempt.device.type == "cuda"
    device = torch.device("cuda", rank) if on_cuda else attempt.device
    if on_cuda:
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group(
            "nccl" if on_cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=count
        )
        run_attempt(
            replace(attempt, device=device),
            (lambda progress: connection.send(("progress", progress))) if rank == 0 else None,
            stop.is_set if rank == 0 else None,
        )
        distributed.barrier()
        connection.send(("done", None))
        distributed.destroy_process_group()
    except PPALError as error:
        connection.send(("failed", error))


def _leave_with_parent() -> None:
    """End this process when its parent is gone: nobody would ever read what it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), name="parent", daemon=True).start()
