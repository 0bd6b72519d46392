"""``make bench ARGS="…"``: each benchmark in a process of its own, which prints its figures.

    python -m benchmarks [all|acquisition|scale|service|detector|dashboard|interactive|load|gpu|photographs|first_boxes]
        [--json] [--quick]

Without a name all of them run that need no GPU, data or 11 GB of disk. Further options go to the benchmark, and
``NAME --help`` lists them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

NAMES = {
    "acquisition": "CCMS, selection and whole queries over pool sizes",
    "scale": "a round over pools of 1,000 to 200,000 images: seconds and memory of every step",
    "service": "latency of /webhook and /health, first idle, then while a detector is in training",
    "detector": "what the difficulty hook adds to a training step, and the one pass to plain inference",
    "dashboard": "how fast every page opens with 20,000 tasks and 50 rounds",
    "interactive": "how fast a rough box or click becomes the detector's box, with detections of 20,000 images",
    "similar": "images like others among 20,000: a card, a box, and twenty images of the map",
    "load": "webhooks and predictions while a round trains, and a project of 20,000 tasks, on a real Label Studio",
    "gpu": "training, inference, CCMS and a round on a GPU beside plain mmdet (docs/gpu.md)",
    "first_boxes": "boxes before the first label: the zoo's detector as it is on a folder of labelled photographs",
    "photographs": "mAP and minutes of a detector of the zoo on a folder of labelled photographs",
}
WITHOUT_NEEDS = tuple(name for name in NAMES if name not in ("gpu", "photographs", "first_boxes", "scale", "similar"))


def main(words: Sequence[str] | None = None) -> int:
    """Run what ``words`` (by default those of the command line) ask for; the exit code of the first that fails."""
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:<12} {what}" for name, what in NAMES.items())
        sys.stdout.write(f"{(__doc__ or '').strip()}\n\n{listed}\n")
        return 0
    name = words.pop(0) if words and not words[0].startswith("-") else "all"
    if name not in (*NAMES, "all"):
        sys.stderr.write(f"benchmarks: expected one of all, {', '.join(NAMES)}, got {name!r}; choose one\n")
        return 2
    try:
        if "--json" in words and name in ("all", "service"):
            answer = _service(words) if name == "service" else {n: _figures(n, words) for n in WITHOUT_NEEDS}
            sys.stdout.write(json.dumps(answer, indent=2) + "\n")
            return 0
        for one in WITHOUT_NEEDS if name == "all" else (name,):
            _run(one, words)
            if one == "service" and not {"--load", "--help"} & set(words):
                _run(one, [*words, "--load"])
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def _figures(name: str, words: Sequence[str]) -> Any:
    return _service(words) if name == "service" else json.loads(_run(name, words, read=True))


def _service(words: Sequence[str]) -> dict[str, Any]:
    plain = [word for word in words if word != "--json"]  # it always prints JSON
    return {key: json.loads(_run("service", [*plain, *more], read=True)) for key, more in
            (("idle", ()), ("training", ("--load",)))}  # fmt: skip


def _run(name: str, words: Sequence[str], read: bool = False) -> str:
    options = [word for word in words if name != "service" or word != "--quick"]  # its sizes are small as they are
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if read else None)
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
