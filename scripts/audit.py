"""Writes a bill of materials of every pinned version, and looks the versions up in a vulnerability service.

    .venv/bin/python scripts/audit.py                 PyPI's service; fails where it does not answer, too
    .venv/bin/python scripts/audit.py --if-answered   no answer at all is told and passes, as in CI without internet
    .venv/bin/python scripts/audit.py --osv-url URL   a service that speaks OSV's API

Bills are CycloneDX, ``build/sbom-*.json``; what pip-audit found is in ``build/audit-*.json``. Exit codes: 0 nothing
known, or nothing answered and that was allowed; 1 a known vulnerability, or versions that could not be looked up.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
SETS = {
    "backend": ("requirements.txt", "requirements-ray.txt", "requirements-s3.txt", "requirements-grounding.txt"),
    "label-studio": ("requirements-label-studio.txt",),
    "tools": ("requirements-dev.txt",),
}
IN_VERSIONS = {  # installed by scripts/setup.sh by the version there
    "TORCH_VERSION": "torch",
    "MMCV_VERSION": "onedl-mmcv",
    "MMDET_VERSION": "onedl-mmdetection",
    "LABEL_STUDIO_ML_VERSION": "label-studio-ml",
    "SETUPTOOLS_VERSION": "setuptools",
    "WHEEL_VERSION": "wheel",
    "NINJA_VERSION": "ninja",
    "PIP_VERSION": "pip",
}
SECONDS = 300


def pinned(name: str) -> list[str]:
    """The exact versions of a set, ``name==version``, sorted.

    Raises:
        SystemExit: a line pins nothing, or a version that setup.sh needs is missing.
    """
    found = set()
    for file in SETS[name]:
        for line in (ROOT / file).read_text().splitlines():
            row = line.split("#")[0].split(";")[0].strip()
            if row and not re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.!+]+", row):
                raise SystemExit(f"audit: expected name==version in {file}, got {line!r}")
            found.add(row)
    if name == "backend":
        versions = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "scripts/versions.env").read_text(), re.M))
        found |= {f"{package}=={versions[variable]}" for variable, package in IN_VERSIONS.items()}
    return sorted(found - {""})


def look_up(name: str, service: Sequence[str]) -> tuple[list[str], int, int, str]:
    """Known vulnerabilities of a set, how many versions were looked up and were not, and why not.

    Args:
        name: of the set.
        service: options of pip-audit that choose the vulnerability service.
    """
    pins = pinned(name)
    listed, answer = BUILD / f"pinned-{name}.txt", BUILD / f"audit-{name}.json"
    listed.write_text("\n".join(pins) + "\n")
    answer.unlink(missing_ok=True)
    _run("cyclonedx-py", "requirements", listed, "--no-validate", "--output-format", "JSON",
         "-o", BUILD / f"sbom-{name}.json", check=True)  # fmt: skip
    # No hashes, no resolution: what stands in the file is looked up and nothing is downloaded.
    done = _run("pip-audit", "--disable-pip", "--no-deps", "--progress-spinner", "off", *service, "-r", listed,
                "--format", "json", "-o", answer)  # fmt: skip
    if not answer.is_file():  # it gives up at the first connection that fails
        return [], 0, len(pins), (done.stderr.strip().splitlines() or ["no answer"])[-1]
    rows = json.loads(answer.read_text())["dependencies"]
    known = [f"{row['name']} {row['version']}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'no version'}"
             for row in rows for hole in row.get("vulns", ())]  # fmt: skip
    skipped = [row["skip_reason"] for row in rows if "skip_reason" in row]
    return known, len(rows) - len(skipped), len(skipped), skipped[0] if skipped else ""


def _run(program: str, *words: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name(program)), *map(str, words)]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=check)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {SECONDS} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Look every set up, tell what was found, and give the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--if-answered", action="store_true", help="pass where no version at all could be looked up")
    parser.add_argument("--osv-url", help="ask this service, by OSV's API, instead of PyPI's")
    options = parser.parse_args(arguments)
    service = ("--vulnerability-service", "osv", "--osv-url", options.osv_url) if options.osv_url else ()
    BUILD.mkdir(exist_ok=True)
    known_all, answered_all, left_all = 0, 0, 0
    for name in SETS:
        known, answered, left, reason = look_up(name, service)
        for line in known:
            print(f"audit: {name}: {line}")
        print(f"audit: {name}: {answered} versions looked up, {len(known)} known vulnerabilities", end="")
        print(f"; {left} NOT looked up: {reason}" if left else "")
        known_all, answered_all, left_all = known_all + len(known), answered_all + answered, left_all + left
    if known_all:
        print("audit: FAILED, raise the versions named above", file=sys.stderr)
        return 1
    if left_all and answered_all == 0 and options.if_answered:
        print("audit: SKIPPED, the vulnerability service does not answer here; before a release run it where it does")
        return 0
    if left_all:
        print("audit: FAILED, no answer is not a clean one: run it where the vulnerability service answers",
              file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
