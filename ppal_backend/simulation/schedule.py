"""The tasks of a simulation, what each waits for, and processes to run them in."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppal_backend.errors import PPALError, RoundCancelled, StateError
from ppal_backend.files import read_json
from ppal_backend.rounds.ports import Engine
from ppal_backend.simulation.data import Benchmark
from ppal_backend.simulation.folder import PLAN, first_model_folder, forget_detections, round_place
from ppal_backend.simulation.plan import Plan
from ppal_backend.simulation.replay import Replay

log = logging.getLogger(__name__)

EngineFactory = Callable[[Plan], Engine]
_ORPHAN_POLL_S = 1.0


@dataclass(frozen=True)
class Task:
    """A part of a simulation that one process does: the first model of a seed, or all rounds of a strategy.

    ``variant`` is empty for a first model. ``after`` names the keys of the tasks that must be over before.
    """

    seed: int
    first_model: str
    variant: str = ""
    after: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Unique name, also for people."""
        return f"seed {self.seed}, {self.variant or f'first model ({self.first_model})'}"


def tasks_of(root: Path, plan: Plan) -> list[Task]:
    """The tasks that are not over yet, in the order of the strategies, each with all seeds, so that the first of them
    can be compared before the last have begun; first models come before the strategies that use them."""
    made: dict[str, Task] = {}
    for variant in sorted(plan.variants, key=lambda v: v.match is not None):
        for seed in plan.seeds:
            places = [round_place(root, seed, variant.folder, k) for k in range(plan.rounds + 1)]
            if all(place.result() is not None for place in places):
                continue
            after = []
            if places[0].result() is None:
                first = Task(seed, variant.first_model)
                made.setdefault(first.key, first)
                after.append(first.key)
            if variant.match is not None:
                after.append(Task(seed, "", variant.match).key)
            task = Task(seed, variant.first_model, variant.name, tuple(after))
            made[task.key] = task
    return list(made.values())


def run_tasks(
    root: Path,
    plan: Plan,
    engine_factory: EngineFactory,
    *,
    jobs: int = 1,
    devices: Sequence[str] = ("auto",),
    keep: bool = False,
) -> None:
    """Run everything that is not over.

    A task that fails does not keep independent ones from running; what it left stays and is taken up again by the
    next call.

    Args:
        root: Folder of the simulation, with plan and data.
        plan: What to do.
        engine_factory: Makes an engine in each process; a function of a module.
        jobs: Processes; 1 runs everything here.
        devices: Shared out among the processes.
        keep: Whether to keep checkpoints and detections.

    Raises:
        RoundCancelled: It was interrupted; the same call goes on.
        StateError: Tasks failed; the message says which and why.
    """
    if jobs < 1 or not devices:
        raise StateError(f"expected at least one process and one device, got {jobs} and {list(devices)}; correct them")
    tasks = tasks_of(root, plan)
    failures: dict[str, str] = {}
    with _executor(min(jobs, max(1, len(tasks)))) as (executor, slots):
        try:
            _drive(tasks, failures, executor, slots, (root, engine_factory, tuple(devices), keep))
        except KeyboardInterrupt:
            raise RoundCancelled("stopped; the same command goes on from here") from None
        except BrokenProcessPool:
            raise StateError(
                "a process of the simulation ended unexpectedly, for want of memory perhaps; the same command goes on "
                "from here (with fewer --jobs)"
            ) from None
    if failures:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in failures.items())
        raise StateError(f"{len(failures)} of {len(tasks)} parts of the simulation failed ({reasons})")
    if not keep:
        for seed in plan.seeds:
            for name in {v.first_model for v in plan.variants}:
                forget_detections(first_model_folder(root, seed, name))


def _drive(
    tasks: list[Task], failures: dict[str, str], executor: Executor, slots: list[int], common: tuple[Any, ...]
) -> None:
    pending, running = list(tasks), dict[Future[None], tuple[Task, int]]()
    free = list(slots)
    while pending or running:
        unfinished = {t.key for t in pending} | {t.key for t, _ in running.values()}
        for task in list(pending):
            broken = [key for key in task.after if key in failures]
            if broken:
                failures[task.key] = f"waits for {broken[0]}"
                pending.remove(task)
            elif free and not unfinished & set(task.after):
                slot = free.pop(0)
                pending.remove(task)
                running[executor.submit(run_task, task, slot, *common)] = (task, slot)
        if not running:
            continue
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task, slot = running.pop(future)
            free.append(slot)
            try:
                future.result()
            except RoundCancelled:
                raise
            except PPALError as error:
                log.error("%s failed: %s", task.key, error)
                failures[task.key] = str(error)


def run_task(
    task: Task, slot: int, root: Path, engine_factory: EngineFactory, devices: tuple[str, ...], keep: bool
) -> None:
    """Do one task in this process."""
    plan = Plan.from_dict(read_json(root / PLAN))
    replay = Replay(
        root,
        plan,
        Benchmark.read(root / "data"),
        engine_factory(plan),
        devices[slot % len(devices)],
        keep,
        _process.stop,
    )
    try:
        if task.variant:
            replay.strategy(task.seed, plan.variant(task.variant))
        else:
            replay.first_model(task.seed, task.first_model)
    except PPALError:
        raise
    except OSError as error:
        raise StateError(_explain(error, root)) from error
    except Exception as error:  # a strategy's fault is not another's
        log.exception("%s failed", task.key)
        raise StateError(f"{type(error).__name__}: {error}; what it did before is kept") from error


def _explain(error: OSError, root: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for {root}; free some and give the same command again, finished rounds are kept"
    return f"{error}; give the same command again once that is repaired, finished rounds are kept"


class _Process:
    """What a process of the pool got when it started."""

    def __init__(self) -> None:
        self.stop: Any = None


_process = _Process()


def _initialise(stop: Any) -> None:
    """In a new process: the parent decides about Ctrl-C, and without a parent there is nothing left to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _process.stop = stop
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_ORPHAN_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextmanager
def _executor(jobs: int) -> Iterator[tuple[Executor, list[int]]]:
    if jobs == 1:
        yield _Inline(), [0]
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_initialise, initargs=(stop,))
    try:
        yield executor, list(range(jobs))
    except BaseException:
        stop.set()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class _Inline(Executor):
    """Runs a call where it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except (PPALError, RoundCancelled) as error:
            future.set_exception(error)
        return future
