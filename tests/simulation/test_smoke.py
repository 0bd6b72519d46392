"""The smoke preset with the real detector: twice the same picks, and the same again through kill -9."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from ppal_backend.files import read_json

pytestmark = pytest.mark.slow

COMMAND = """
import sys
from pathlib import Path
from ppal_backend.simulation.run import SimulationOptions, simulate
if __name__ == "__main__":
    simulate(SimulationOptions(Path(sys.argv[1]), "smoke", jobs=int(sys.argv[2])))
"""


def start(out, jobs=1):
    script = out.with_suffix(".py")
    script.write_text(COMMAND)  # a file, since processes of their own import it
    return subprocess.Popen([sys.executable, str(script), str(out), str(jobs)], env={**os.environ})


def picks(out):
    found = {p.parent.relative_to(out): read_json(p) for p in out.glob("seed-*/*/*/result.json")}
    return {place: (result["picks"], result["map"]) for place, result in found.items()}


def wait_for(out, pattern, process):
    while not list(out.glob(pattern)):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke") / "a"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert start(out).wait() == 0
    assert read_json(out / "report" / "summary.json")["complete"]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 180, "CPU time, whatever else runs"
    return picks(out)


KILL_WHEN = (
    "seed-0/first-default/train/iter_25.pth",
    "seed-0/first-default/steps/train.json",
    "seed-0/ppal/round-01/train/iter_50.pth",
    "seed-0/ppal/round-01/steps/infer.json",
    "seed-0/random/round-02/labelled.json",
)


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_resumed_the_picks_are_equal(undisturbed, tmp_path, jobs):
    out = tmp_path / "b"
    for pattern in KILL_WHEN:
        process = start(out, jobs)
        wait_for(out, pattern, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start(out, jobs).wait() == 0
    assert picks(out) == undisturbed and len(undisturbed) == 9
