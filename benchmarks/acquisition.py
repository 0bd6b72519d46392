"""Speed and memory of acquisition on synthetic pools: CCMS, selection, whole queries, and the lazy form.

    python -m benchmarks.acquisition [--json] [--quick]
    python -m benchmarks.acquisition --neighbour 4000

Pools have 80 classes by Zipf's law and 100 detections an image with 256-d embeddings, of which about 12 are valid.
Every size runs in a process of its own, so that its peak resident memory (the pool included) is its own. GEMM rates
are measured in the same process, before and after; a share is useful work (each pair of same-class objects once) per
second over that rate. ``--quick`` takes sizes of seconds; the keys of the large sizes are then null. ``--neighbour``
compares one thread with two while another process keeps one core busy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppal_backend.acquisition.budget import Budget
from ppal_backend.acquisition.ccms import similarity_matrix
from ppal_backend.acquisition.ccms.objects import pack_objects
from ppal_backend.acquisition.ccms.tiles import class_rows
from ppal_backend.acquisition.clustering import METHODS, k_center_greedy, refine_centers
from ppal_backend.acquisition.distances import DenseDistances
from ppal_backend.acquisition.selection import Comparison, DiverseSelector
from ppal_backend.acquisition.strategies import get_strategy
from ppal_backend.structures import CandidatePool, Detections, QueryContext

CLASSES = 80
DETECTIONS = 100
VALID = 12
WIDTH = 256
RATIO_SIZE = 400
REFINEMENT_SIZE = 4_000
PAPER_SIZE = 9_460
PAPER_BUDGET = 2_365
LAZY_SIZE = 40_000
LAZY_BUDGET = 10_000
TABLE = (1_000, 2_000, 4_000, PAPER_SIZE, 20_000, LAZY_SIZE)
QUICK = (500, 1_000, 2_000)
KINDS = ("zipf", "even", "few")
HALF_FROM = 12_000
NEIGHBOUR_TURNS = 7
_GIB = float(1 << 30)


def plain_similarity(pool: Sequence[Detections], score_threshold: float = 0.05) -> np.ndarray:
    """``[N, N]`` CCMS as one would first write it, the yardstick: for every pair of images one small dense computation.

    Args:
        pool: N images, each with at least one valid detection.
        score_threshold: Lowest score that counts.
    """
    images = []
    for d in pool:
        embeddings, scores, classes = (torch.as_tensor(v) for v in (d.embeddings, d.scores, d.class_indices))
        keep = scores >= score_threshold
        f = embeddings[keep]
        images.append((f / f.norm(dim=1, keepdim=True), scores[keep], classes[keep]))
    result = torch.zeros(len(pool), len(pool))
    for i, (f, t, c) in enumerate(images):
        for j, (g, u, e) in enumerate(images):
            cosine = (f @ g.T + 1.0) * (c[:, None] == e[None, :])
            if not cosine.numel():
                continue
            there = (t * cosine.max(1).values).sum() / t.sum()
            back = (u * cosine.max(0).values).sum() / u.sum()
            result[i, j] = 0.5 * (there + back)
    return result.fill_diagonal_(2.0).numpy()


def class_odds(kind: str) -> np.ndarray:
    """``[C]`` how often each class is: by Zipf's law (the first is a fifth of all objects), ``even`` or ``few``, 3."""
    if kind == "even":
        return np.ones(CLASSES)
    return np.ones(3) if kind == "few" else 1.0 / np.arange(1, CLASSES + 1)


def synthetic_pool(images: int, seed: int = 0, kind: str = "zipf") -> list[Detections]:
    """A pool; from 12,000 images on embeddings are stored in half precision, as the pool itself would need 4 GiB."""
    rng = np.random.default_rng(seed)
    odds = class_odds(kind)
    dtype = np.float16 if images >= HALF_FROM else np.float32
    boxes = np.tile(np.array([0, 0, 50, 50], np.float32), (DETECTIONS, 1))
    pool = []
    for image_id in range(images):
        valid = min(DETECTIONS, int(rng.poisson(VALID)))
        scores = np.sort(np.concatenate([rng.uniform(0.05, 1, valid), rng.uniform(0, 0.049, DETECTIONS - valid)]))[::-1]
        pool.append(
            Detections(
                image_id=image_id,
                boxes_xyxy=boxes,
                scores=scores.astype(np.float32),
                class_indices=rng.choice(len(odds), DETECTIONS, p=odds / odds.sum()),
                embeddings=rng.standard_normal((DETECTIONS, WIDTH), dtype=np.float32).astype(dtype),
            )
        )
    return pool


def gemm_rate_per_cpu(side: int = 2048, repeats: int = 8) -> float:
    """The same product in GFLOP for each second of processor time, which other programs disturb less."""
    a, b, best = torch.randn(side, WIDTH), torch.randn(WIDTH, side), 0.0
    out = torch.empty(side, side)
    for _ in range(repeats):
        start = time.process_time()
        torch.mm(a, b, out=out)
        best = max(best, 2.0 * side * side * WIDTH / (time.process_time() - start) / 1e9)
    return best


def measure_classes(images: int, kind: str) -> dict[str, Any]:
    """CCMS of a pool whose classes are spread in one way, and its share of GEMM by time and by processor time."""
    pool = synthetic_pool(images, kind=kind)
    work, objects = useful_gflop(pool), pack_objects(pool)
    held = torch.bincount(objects.classes)
    before, per_cpu = gemm_rate(), gemm_rate_per_cpu()
    cpu = time.process_time()
    seconds, _ = timed(lambda: similarity_matrix(pool))
    cpu = time.process_time() - cpu
    rate = max(before, gemm_rate())
    return {
        "images": images,
        "kind": kind,
        "largest_class": round(float(held.max() / held.sum()), 3),
        "useful_gflop": work,
        "ccms_s": seconds,
        "ccms_cpu_s": cpu,
        "gemm_share": work / seconds / rate,
        "gemm_share_cpu": work / cpu / per_cpu,
    }


def gemm_rate(device: str = "cpu", side: int = 2048, repeats: int = 8) -> float:
    """Best measured rate of a float32 product with inner width 256, in GFLOP/s."""
    a, b = torch.randn(side, WIDTH, device=device), torch.randn(WIDTH, side, device=device)
    out = torch.empty(side, side, device=device)
    best = math.inf
    for _ in range(repeats):
        best = min(best, timed(lambda: torch.mm(a, b, out=out), device)[0])
    return 2.0 * side * side * WIDTH / best / 1e9


def timed(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Seconds that ``work`` takes, and its result."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak_gib() -> float:
    """Highest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / _GIB
    return math.nan


class PeakObserver:
    """Observer of a round whose steps' peak memory is measured; nobody else is told anything."""

    def __init__(self) -> None:
        self._step, self.peaks_gib = "", dict[str, float]()

    def step_started(self, step: str) -> None:
        """Note the peak of the step before, and begin anew."""
        if self._step:
            self.peaks_gib[self._step] = round(peak_gib(), 3)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        self._step = step

    def report_problem(self, topic: str, problem: str) -> None:
        """Nobody to tell."""

    def fence(self) -> None:
        """Nobody else runs this round."""

    def exported(self, annotation_ids: Sequence[int]) -> None:
        """Nothing to note."""

    def progress(self, progress: object) -> None:
        """Nothing to show."""

    def should_stop(self) -> bool:
        """Never."""
        return False


def useful_gflop(pool: Sequence[Detections]) -> float:
    """Work of one product per unordered pair of same-class objects."""
    objects = pack_objects(pool)
    return sum(len(rows) ** 2 for _, rows in class_rows(objects)) / 2 * 2 * WIDTH / 1e9


def measure_stages(pool: Sequence[Detections], budget: int) -> dict[str, float]:
    """Seconds of the similarity matrix, and of choosing and ordering on it."""
    cpu = time.process_time()
    seconds, matrix = timed(lambda: similarity_matrix(pool))
    cpu = time.process_time() - cpu
    distances = DenseDistances.trusted(torch.from_numpy(matrix).neg_().add_(2.0))
    selector = DiverseSelector(lambda context, candidates: Comparison(distances, None, 2.0))
    context, costs = QueryContext(pool, CLASSES), Budget(budget, [1] * len(pool))
    rng = np.random.default_rng(0)
    selection, _ = timed(lambda: selector.select(context, range(len(pool)), costs, rng))
    return {"ccms_s": seconds, "ccms_cpu_s": cpu, "select_s": selection}


def measure(images: int, budget: int) -> dict[str, float]:
    """Figures of one pool size; the whole query takes every image as a candidate."""
    pool = synthetic_pool(images)
    figures: dict[str, float] = {"images": images, "budget": budget, "pool_gib": peak_gib()}
    work = useful_gflop(pool)
    before = gemm_rate()
    dense = 4.0 * images**2 / _GIB <= 1.5
    if dense:
        figures |= measure_stages(pool, budget)
        figures["ccms_gflops"] = work / figures["ccms_s"]
    context = QueryContext(pool, CLASSES)
    strategy = get_strategy("ppal")
    rng = np.random.default_rng(0)
    seconds, everything = timed(lambda: strategy.candidates(context, images, rng))
    figures["stage_1_s"] = seconds
    given = CandidatePool(everything.image_ids, everything.utilities)
    seconds, answer = timed(lambda: strategy.query(context, budget, rng, given))
    figures |= {"query_s": seconds + figures["stage_1_s"], "chosen": len(answer)}
    rate = max(before, gemm_rate())
    figures |= {"gemm_gflops": rate, "useful_gflop": work, "peak_gib": peak_gib()}
    if dense:
        figures["gemm_share"] = figures["ccms_gflops"] / rate
    return figures


def measure_ratio(images: int) -> dict[str, float]:
    """Seconds of a plain dense per-pair implementation over those of ours."""
    pool = synthetic_pool(images)
    similarity_matrix(pool[:50])
    ours = min(timed(lambda: similarity_matrix(pool))[0] for _ in range(5))
    plain, wanted = timed(lambda: plain_similarity(pool))
    error = float(np.abs(wanted - similarity_matrix(pool)).max())
    return {"images": images, "ours_s": ours, "plain_s": plain, "ratio": plain / ours, "largest_difference": error}


def measure_refinement(images: int) -> dict[str, float]:
    """The paper's alternation and FasterPAM from the same greedy centres: seconds and summed distance."""
    distances = DenseDistances.trusted(torch.from_numpy(similarity_matrix(synthetic_pool(images))).neg_().add_(2.0))
    centers = k_center_greedy(distances, images // 4, first=0)
    figures: dict[str, float] = {
        "images": images,
        "greedy_cost": refine_centers(distances, centers, "kmedoids", 0).cost,
    }
    for method in METHODS:
        seconds, clusters = timed(lambda method=method: refine_centers(distances, centers, method))  # type: ignore[misc]
        figures |= {f"{method}_s": seconds, f"{method}_cost": clusters.cost}
    return figures


def measure_neighbour(images: int, turns: int = NEIGHBOUR_TURNS) -> dict[str, Any]:
    """CCMS on one thread and on two, taking turns, beside a process that never rests on the last core; medians."""
    pool, seconds, cpu = synthetic_pool(images), {1: list[float](), 2: list[float]()}, {1: 0.0, 2: 0.0}
    core = max(os.sched_getaffinity(0))
    rest = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", rest])
    threads = torch.get_num_threads()
    try:
        similarity_matrix(pool[:100])
        for turn in range(turns):
            for count in (1, 2) if turn % 2 else (2, 1):
                torch.set_num_threads(count)
                used = time.process_time()
                seconds[count].append(timed(lambda: similarity_matrix(pool))[0])
                cpu[count] += (time.process_time() - used) / turns
    finally:
        torch.set_num_threads(threads)
        neighbour.kill()
        neighbour.wait()
    one, two = (float(np.median(seconds[count])) for count in (1, 2))
    return {
        "images": images, "one_thread_s": one, "two_threads_s": two, "ratio": two / one,
        "one_thread_cpu_s": cpu[1], "two_threads_cpu_s": cpu[2], "load_average": os.getloadavg()[0],
    }  # fmt: skip


def exponent(rows: Sequence[dict[str, float]], key: str) -> float | None:
    """Slope of log seconds over log images."""
    points = [(math.log(r["images"]), math.log(r[key])) for r in rows if r.get(key)]
    if len(points) < 2:
        return None
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def in_fresh_process(*arguments: str) -> dict[str, Any]:
    """Run one measurement of this module in a new process.

    Its idle threads sleep rather than spin: beside other busy processes spinning makes two threads slower than one.
    """
    command = [sys.executable, "-m", "benchmarks.acquisition", *arguments]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def budget_of(images: int) -> int:
    """A quarter of the candidates, as in the paper (delta = 4)."""
    return {PAPER_SIZE: PAPER_BUDGET, LAZY_SIZE: LAZY_BUDGET}.get(images, images // 4)


def run(
    sizes: Sequence[int] = TABLE,
    ratio_size: int | None = RATIO_SIZE,
    refinement_size: int | None = REFINEMENT_SIZE,
    classes_size: int | None = PAPER_SIZE,
) -> dict[str, Any]:
    """All figures, under the keys that reports use.

    Args:
        sizes: Pool sizes of the table.
        ratio_size: Size at which the plain implementation is timed, or None to leave it out.
        refinement_size: Size at which the two ways of refining are compared, or None to leave it out.
        classes_size: Size at which classes are spread in several ways, or None to leave it out.
    """
    rows = [in_fresh_process("--size", str(n), "--budget", str(budget_of(n))) for n in sizes]
    ratio = in_fresh_process("--ratio", str(ratio_size)) if ratio_size else {}
    refinement = in_fresh_process("--refinement", str(refinement_size)) if refinement_size else {}
    kinds = KINDS if classes_size else ()
    classes = [in_fresh_process("--kind", kind, "--size", str(classes_size)) for kind in kinds]
    paper: dict[str, Any] = next((r for r in rows if r["images"] == PAPER_SIZE), {})
    lazy: dict[str, Any] = next((r for r in rows if r["images"] == LAZY_SIZE), {})
    matrices = [r for r in rows if "ccms_s" in r]
    return {
        "ccms_ratio_400": ratio.get("ratio") if ratio_size == RATIO_SIZE else None,
        "ccms_9460_s": paper.get("ccms_s"),
        "ccms_9460_gemm_share": paper.get("gemm_share"),
        "select_9460_s": paper.get("select_s"),
        "peak_gib_9460": paper.get("peak_gib"),
        "lazy_40000_s": lazy.get("query_s"),
        "lazy_40000_gib": lazy.get("peak_gib"),
        "ccms_exponent": exponent(matrices, "ccms_s"),
        "select_exponent": exponent(matrices, "select_s"),
        "query_exponent": exponent(rows, "query_s"),
        "ratio": ratio,
        "refinement": refinement,
        "classes": classes,
        "table": rows,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    columns = (
        ("images", "{:.0f}"),
        ("budget", "{:.0f}"),
        ("ccms_s", "{:.2f}"),
        ("ccms_cpu_s", "{:.2f}"),
        ("select_s", "{:.2f}"),
        ("stage_1_s", "{:.2f}"),
        ("query_s", "{:.2f}"),
        ("pool_gib", "{:.2f}"),
        ("peak_gib", "{:.2f}"),
        ("ccms_gflops", "{:.0f}"),
        ("gemm_gflops", "{:.0f}"),
        ("gemm_share", "{:.2f}"),
    )
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in report["table"]:
        cells = [shape.format(row[name]) if name in row else "lazy" for name, shape in columns]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| classes | largest class | CCMS s | GFLOP | share of GEMM | by processor time |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["classes"]:
        lines.append(
            f"| {row['kind']} | {row['largest_class']:.2f} | {row['ccms_s']:.2f} | {row['useful_gflop']:.0f} | "
            f"{row['gemm_share']:.2f} | {row['gemm_share_cpu']:.2f} |"
        )
    for key, value in {**report, **report["refinement"]}.items():
        if not isinstance(value, list | dict):
            lines.append(f"{key}: {value if value is None or isinstance(value, int) else round(value, 3)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="small pools only")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--ratio", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--refinement", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--neighbour", type=int, help="images; one thread against two beside a busy process, alone")
    options = parser.parse_args(arguments)
    if options.neighbour:
        answer: dict[str, Any] = measure_neighbour(options.neighbour)
    elif options.ratio:
        answer = measure_ratio(options.ratio)
    elif options.refinement:
        answer = measure_refinement(options.refinement)
    elif options.kind:
        answer = measure_classes(options.size, options.kind)
    elif options.size:
        answer = measure(options.size, options.budget)
    else:
        answer = run(QUICK, 100, 400, 500) if options.quick else run()
        if not options.json:
            sys.stdout.write(table(answer) + "\n")
            return
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
