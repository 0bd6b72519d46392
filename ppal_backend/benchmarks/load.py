"""Load on a real Label Studio: webhooks and predictions while a round trains, and a project of 20,000 tasks.

    python -m ppal_backend.benchmarks.load [--json] [--quick]

runs :mod:`~ppal_backend.benchmarks.under_load` and then :mod:`~ppal_backend.benchmarks.large_project`, and holds the
figures against what is asked for. ``--quick`` takes small sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ppal_backend.benchmarks import large_project, under_load

WEBHOOK_P99_MS = 50.0
PUBLISH_RATIO = 1.3


def run(quick: bool = False) -> dict[str, Any]:
    """All figures, and whether each target is met."""
    if quick:
        figures = {**under_load.run(5.0, 50.0, 60, 1), **large_project.run(500, 200)}
    else:
        figures = {**under_load.run(), **large_project.run()}
    webhooks = figures["webhooks"]
    targets = {
        "no webhook is lost": webhooks["lost"] == webhooks["refused"] == 0,
        f"webhook p99 < {WEBHOOK_P99_MS:.0f} ms": webhooks["ms"]["p99"] < WEBHOOK_P99_MS,
        "no prediction fails": not any(row["errors"] for row in figures["predictions"]),
        f"publishing <= {PUBLISH_RATIO} x a bare import": figures["publishing"]["ratio"] <= PUBLISH_RATIO,
    }
    return {"targets": targets, **figures}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    hooks, large, publishing = report["webhooks"], report["large"], report["publishing"]
    ms = hooks["ms"]
    lines = [
        f"{ms['count']} webhooks at {hooks['rate_per_s']:.0f}/s beside a training: p50 {ms['p50']} ms, "
        f"p99 {ms['p99']} ms, max {ms['max']} ms; refused {hooks['refused']}, lost {hooks['lost']}, "
        f"stored twice {hooks['twice']}; all handled {hooks['handled_s']} s after the last"
    ]
    for row in report["predictions"]:
        beside = "beside a training" if row["training"] else "idle"
        lines.append(
            f"{under_load.PREDICTING} callers, {under_load.TASKS} tasks each, {beside}: p50 {row['ms']['p50']} ms, "
            f"p99 {row['ms']['p99']} ms, {row['tasks_per_s']} tasks/s, errors {row['errors']}"
        )
    lines.append(f"{large['tasks']} tasks (imported in {large['imported_s']} s), {large['tasks_ranked']} ranked:")
    lines += ["| step | s | peak GiB |", "|---|---|---|"]
    lines += [f"| {step} | {s} | {large['peak_gib'][step]} |" for step, s in large["seconds"].items()]
    lines.append(
        f"publishing {publishing['tasks']} tasks of {publishing['boxes']} boxes: {publishing['publish_s']} s, a bare "
        f"import {publishing['bare_s']} s, ratio of the medians {publishing['ratio']}"
    )
    lines += [f"{'met' if met else 'MISSED'}: {target}" for target, met in report["targets"].items()]
    return "\n".join([*lines, f"load average {report['load_average'][0]:.1f}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Load on a real Label Studio.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args(arguments)
    report = run(options.quick)
    sys.stdout.write((json.dumps(report, indent=1) if options.json else table(report)) + "\n")


if __name__ == "__main__":
    main()
