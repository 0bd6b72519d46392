"""``make demo``: a real Label Studio, the backend, and a scripted annotator through two rounds of training."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ppal_backend.datasets.ground_truth import GroundTruth, read_user_coco, split
from ppal_backend.demo.annotator import ScriptedAnnotator
from ppal_backend.errors import DatasetError
from ppal_backend.files import write_json
from ppal_backend.rig.backend import Backend
from ppal_backend.rig.label_studio_server import LabelStudioServer
from ppal_backend.rounds.folder import RoundFolder, Rounds
from ppal_backend.settings import Settings, load_settings
from ppal_backend.store import RoundRecord
from ppal_backend.synthetic.scenes import generate

ROUND_TIMEOUT_S = 900.0
PICKS_SHOWN = 10
FEWEST_TESTED = 20
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")
Evaluate = Callable[[str, Path, tuple[str, ...], Path], float | None]
"""mAP of a detector (name, checkpoint, labels) on a COCO file; None without any box."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does. ``coco`` and ``images_dir`` replace the generated data by the user's own.

    ``test_images`` are set aside (of data of the user's own at most a fifth): they never come to Label Studio, and tell
    how good each version is. The few images that a round holds out would tell little.
    """

    out: Path
    stay: bool = True
    images: int = 360
    test_images: int = 100
    budget: int = 40
    rounds: int = 2
    holdout_fraction: float = 0.15
    seed: int = 0
    coco: Path | None = None
    images_dir: Path | None = None
    label_studio: Path = Path(".venv-label-studio/bin/label-studio")


@dataclass
class _Report:
    """What goes into summary.json."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    queue_published: list[int] = field(default_factory=list)
    queue_served: list[int] = field(default_factory=list)


def run_demo(options: DemoOptions, console: Console, evaluate: Evaluate) -> None:
    """Run the demo; with ``stay`` the servers remain up until Ctrl-C.

    Args:
        options: What to do.
        console: Where to tell of it.
        evaluate: Looks at the test images.

    Raises:
        PPALError: a step failed; the text says which file has the details.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    started = time.perf_counter()
    out = options.out.absolute()
    for part in ("label-studio", "backend"):
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "summary.json").unlink(missing_ok=True)
    truth, test = _data(options, out, console)
    template = load_settings().cache_dir / "label-studio"
    with _reported_step(console, "starting Label Studio") as show:
        server = LabelStudioServer(
            options.label_studio, out / "label-studio", template_cache=template, on_wait=lambda s: show(f"{s:.0f} s")
        )
        server.start()
    backend = Backend(out / "backend", server.url, server.token, _environment(options))
    try:
        with _reported_step(console, "starting the backend"):
            backend.start()
        report, project_id = _label_and_train(
            options, server, backend, truth, _tester(test, evaluate, console), console
        )
        summary = {
            "rounds": report.rounds,
            "queue_published": report.queue_published,
            "queue_served": report.queue_served,
            "seconds_total": round(time.perf_counter() - started, 1),
        }
        write_json(out / "summary.json", summary)
        _show_end(console, out, summary)
        if options.stay:
            _stay(console, server, backend, project_id)
    finally:
        with _reported_step(console, "stopping"):
            backend.stop()
            server.stop()


def _environment(options: DemoOptions) -> dict[str, str]:
    return {
        "START_TRAINING_EACH_N_UPDATES": str(options.budget),
        "PPAL_HOLDOUT_FRACTION": str(options.holdout_fraction),
        "PPAL_SEED": str(options.seed),
        "PPAL_DETECTOR": "retinanet_tiny",
        "PPAL_MAX_ITERATIONS": "300",  # half the detector's own schedule: a demo should be short
    }


def _data(options: DemoOptions, out: Path, console: Console) -> tuple[GroundTruth, Path | None]:
    """The data to label, and a COCO file of the test images; None where there are too few to set some aside."""
    needed = options.budget * options.rounds + PICKS_SHOWN
    if options.coco is not None:
        truth = read_user_coco(options.coco, options.images_dir)
        console.print(f"your data: {truth.report}")
        count = len(truth.dataset.images)
        testing = min(options.test_images, count // 5, count - needed)
    else:
        count, testing = options.images + options.test_images, options.test_images
        with _reported_step(console, "generating images") as show:
            path = generate(out / "data", count, options.seed, on_progress=lambda done, n: show(f"{done} of {n}"))
        truth = read_user_coco(path)
    if count < needed:
        raise DatasetError(f"expected at least {needed} images for the demo, got {count}; add some")
    if testing < FEWEST_TESTED:
        return truth, None
    parts = split(truth, {"tasks": count - testing, "test": testing}, seed=options.seed)
    parts["test"].dataset.write(out / "test.json")
    return parts["tasks"], out / "test.json"


def _tester(test: Path | None, evaluate: Evaluate, console: Console) -> Callable[[RoundFolder], float | None]:
    """Gives the mAP of a round's model on the test images; None without any."""

    def tested(folder: RoundFolder) -> float | None:
        if test is None:
            return None
        stored = folder.read("train/model.json")
        with _reported_step(console, "looking at the test images, which nobody labels"):
            checkpoint = Path(folder.checkpoint(stored["checkpoint"]))
            return evaluate(stored["detector"], checkpoint, tuple(stored["labels"]), test)

    return tested


def _label_and_train(
    options: DemoOptions,
    server: LabelStudioServer,
    backend: Backend,
    truth: GroundTruth,
    tested: Callable[[RoundFolder], float | None],
    console: Console,
) -> tuple[_Report, int]:
    with _reported_step(console, "creating the project and uploading images") as show:
        project_id = server.create_project("PPAL demo", label_config_of(truth.labels))
        paths = list(truth.paths().values())
        tasks = server.import_images(project_id, paths, on_progress=lambda done, n: show(f"{done} of {n}"))
    by_path = truth.truths_by_path()
    annotator = ScriptedAnnotator(server.url, server.token, project_id, {t: by_path[p] for t, p in tasks.items()})
    with _reported_step(console, "connecting the backend; before the first model the order is random"):
        backend.connect(server.session, project_id)
        backend.wait_for_round(project_id, 1, ROUND_TIMEOUT_S)
    report = _Report()
    for number in range(2, options.rounds + 2):
        with _reported_step(
            console, f"the scripted annotator labels {options.budget} tasks in Label Studio's order"
        ) as show:
            served = annotator.label(options.budget, lambda _task, done: show(f"{done} of {options.budget}"))
        if number > 2:
            report.queue_served = served
        record = _watch_round(console, backend, project_id, number)
        folder = RoundFolder(Rounds(_settings(backend)).path(project_id, number))
        report.rounds.append({**_figures(record), "test_map": tested(folder)})
        query = folder.read("query_set.json")
        if number == 2:
            report.queue_published = query["queue"][: options.budget]
        show_picks(console, report.rounds[-1], query, truth.labels)
    annotator.close()
    return report, project_id


def _watch_round(console: Console, backend: Backend, project_id: int, number: int) -> RoundRecord:
    columns = (
        TextColumn("  {task.description:<11}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console.print(f"[bold]round {number}[/]: enough annotations came in by webhook, training starts by itself")
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("waiting", total=None, detail="")
        last = ""

        def show(record: RoundRecord) -> None:
            nonlocal last
            if record.step and record.step != last:
                bars.reset(bar, total=None, description=record.step, detail="")
                if not console.is_terminal:
                    console.print(f"  … {record.step}")
                last = record.step
            if record.progress:
                shown = record.progress
                detail = f"{shown['done']}/{shown['total']} {shown['detail']}"
                bars.update(bar, total=shown["total"], completed=shown["done"], detail=detail)

        return backend.wait_for_round(project_id, number, ROUND_TIMEOUT_S, show)


def _figures(record: RoundRecord) -> dict[str, Any]:
    metrics = record.metrics
    return {
        "version": metrics["version"],
        "map": metrics.get("map"),
        "held_out_images": metrics["held_out_images"],
        "labelled_images": metrics["labelled_images"],
        "seconds": metrics["seconds"],
    }


def show_picks(console: Console, figures: dict[str, Any], query: dict[str, Any], labels: tuple[str, ...]) -> None:
    """Say what a round published, and why its first picks are worth labeling."""
    parts = ["not evaluated"]
    if figures["map"] is not None:
        parts = [f"mAP {figures['map']:.3f} on the {figures['held_out_images']} annotated images that it held out"]
    if figures["test_map"] is not None:
        parts.insert(0, f"mAP {figures['test_map']:.3f} on test images")
    console.print(f"  published as [bold]{figures['version']}[/]: {'; '.join(parts)}")
    table = Table("rank", "task", "uncertainty", "place by it", "what makes it worth labeling", title="first picks")
    for rank, task_id in enumerate(query["image_ids"][:PICKS_SHOWN]):
        why = query["explanations"].get(str(task_id))
        if why is None:  # not the strategy's choice
            table.add_row(str(rank), str(task_id), "–", "–", "picked at random to measure the detector")
            continue
        row = (str(rank), str(task_id), f"{why['utility']:.2f}", str(why["utility_rank"]), in_words(why, labels))
        table.add_row(*row)
    console.print(table)


def in_words(why: dict[str, Any], labels: tuple[str, ...]) -> str:
    """The reason for a pick as a sentence."""
    parts = [f"{c['boxes']} unsure {labels[c['class_index']]}" for c in why["classes"][:2] if c["boxes"]]
    text = " and ".join(parts) or "no boxes predicted"
    others = (why.get("cluster_size") or 1) - 1
    if others:
        text += f"; stands for {others} more image{'s' if others > 1 else ''}"
    if why.get("nearest_similarity") is not None:
        text += f"; {why['nearest_similarity'] / 2:.0%} like task {why['nearest_chosen']}"
    return text


def label_config_of(labels: tuple[str, ...]) -> str:
    """A labeling config with these labels on an image."""
    rows = "".join(
        f"<Label value={quoteattr(label)} background={quoteattr(COLOURS[i % len(COLOURS)])}/>"
        for i, label in enumerate(labels)
    )
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{rows}</RectangleLabels></View>'
    )


def _show_end(console: Console, out: Path, summary: dict[str, Any]) -> None:
    same = summary["queue_published"] == summary["queue_served"]
    found = [r["map"] if r["test_map"] is None else r["test_map"] for r in summary["rounds"]]
    maps = " → ".join("?" if value is None else f"{value:.3f}" for value in found)
    console.print(f"\n[bold green]done[/] in {summary['seconds_total']:.0f} s: mAP {maps} with", end=" ")
    console.print(" → ".join(str(r["labelled_images"]) for r in summary["rounds"]), "labelled images")
    served = "in exactly the published order" if same else "NOT in the published order"
    console.print(f"Label Studio served the second batch {served}; figures in {out / 'summary.json'}")


def _stay(console: Console, server: LabelStudioServer, backend: Backend, project_id: int) -> None:
    console.print(f"\nLabel Studio  {server.url}/projects/{project_id}/data   (press [bold]Label All Tasks[/])")
    console.print(f"login         {server.username}  password {server.password}")
    console.print(f"ML backend    {backend.url}   log {backend.log_path}")
    console.print("Ctrl-C stops both.")
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        sys.stdout.write("\n")


def _settings(backend: Backend) -> Settings:
    return load_settings(MODEL_DIR=backend.model_dir)


@contextmanager
def _reported_step(console: Console, what: str) -> Iterator[Any]:
    """Say what is being done, how far it is, and how long it took."""
    started = time.perf_counter()
    with console.status(what) as status:
        yield lambda detail: status.update(f"{what}: {detail}")
    console.print(f"[green]✓[/] {what} ({time.perf_counter() - started:.1f} s)")
