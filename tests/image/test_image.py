"""The container image is built as the Dockerfile stands, and works as its user on a fresh volume."""

import json
import os
import re
import signal
import subprocess
import time

import psutil
import pytest
import requests

from ppal_backend.files import read_json
from tests.image.buildah import IMAGE
from tests.servers import free_port, wait_for

pytestmark = pytest.mark.image
USER = 10001


class Volume:
    """A fresh volume of the image's user, and commands on it as Docker would run them."""

    def __init__(self, buildah, folder, owner=USER):
        self.buildah, self.folder = buildah, folder
        folder.mkdir()
        os.chown(folder, owner, owner)
        self.container = buildah("from", IMAGE)
        buildah("config", "--volume=/data-", self.container)  # its own volume there would hide ours

    def command(self, *words, **variables):
        environment = [f"--env={name}={value}" for name, value in variables.items()]
        return [*self.buildah.command, "run", "--isolation=chroot", f"--volume={self.folder}:/data", *environment,
                self.container, "--", *words]  # fmt: skip

    def run(self, *words, **variables):
        return subprocess.run(self.command(*words, **variables), capture_output=True, text=True, check=False)


@pytest.fixture
def volume(buildah, tmp_path):
    volume = Volume(buildah, tmp_path / "volume")
    yield volume
    buildah("rm", volume.container)


def test_what_is_shipped_is_in_layers_by_how_often_it_changes(buildah, context, told):
    config = buildah.inspect()["config"]
    assert (config["User"], config["WorkingDir"], config["Cmd"]) == (str(USER), "/data", ["ppal", "up"])
    assert config["StopSignal"] == "SIGTERM" and "Healthcheck" in config and "/data" in config["Volumes"]
    _, _, environment, zoo, code, bytecode = buildah.layers()
    assert 1000 < environment < 2000, "torch without CUDA"
    assert zoo + code + bytecode < 20, "what a change of our code ships again"
    with (context / "ppal_backend" / "cli.py").open("a") as file:
        file.write("\n# changed\n")
    said, seconds = buildah.build(context)
    assert "setup]" not in said, "the environment is not made again"
    assert buildah.layers()[2] == environment
    told(f"built again after a change of code in {seconds:.0f} s")


def test_nothing_is_missing_for_its_python(volume):
    """Some packages need another one on some versions of Python only."""
    missing = re.findall(
        r"^(\S+) \S+ requires ([\w-]+), which is not installed", volume.run("pip", "check").stdout, re.M
    )
    # Installed without what only their other uses need: setup.sh says why.
    assert {name for name, _ in missing} <= {"imaug", "onedl-mmcv", "label-studio-sdk", "label-studio-ml", "rq"}


def test_bytecode_is_there_and_what_headless_opencv_does_not_need_is_not(volume, told):
    code = (
        "import importlib.util, json, pathlib, ppal_backend, mmdet\n"
        "compiled = lambda path: pathlib.Path(importlib.util.cache_from_source(str(path))).is_file()\n"
        "files = {m.__name__: pathlib.Path(m.__file__).parent.rglob('*.py') for m in (ppal_backend, mmdet)}\n"
        "print(json.dumps({name: [str(p) for p in paths if not compiled(p)] for name, paths in files.items()}))"
    )
    lacking = json.loads(volume.run("python", "-W", "ignore", "-c", code).stdout.splitlines()[-1])
    assert lacking["ppal_backend"] == [] and len(lacking["mmdet"]) < 5, lacking
    found = volume.run("sh", "-c", "find / -xdev -name 'libGL.so*' -o -xdev -name 'libLLVM*'; command -v gcc").stdout
    assert found == ""
    seconds = []
    for module in ("mmdet.apis", "ppal_backend.cli"):
        timed = f"import os; import {module}; print(sum(os.times()[:2]))"
        seconds.append(float(volume.run("python", "-W", "ignore", "-c", timed).stdout.splitlines()[-1]))
    told(f"CPU seconds to import mmdet {seconds[0]:.1f}, the command line {seconds[1]:.1f}")


def test_it_serves_tells_and_stops(volume, told):
    port = str(free_port())
    variables = {"PPAL_HOST": "127.0.0.1", "PPAL_PORT": port, "LABEL_STUDIO_URL": "http://127.0.0.1:9"}
    command = volume.buildah.inspect()["config"]["Cmd"]
    log = volume.folder.parent / "log"
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(volume.command(*command, **variables), stdout=file, stderr=file)
    try:
        answers = lambda: requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok  # noqa: E731
        wait_for(lambda: process.poll() is not None or answers(), "the service answers", 240)
        assert process.poll() is None, log.read_text()[-3000:]
        healthy_s = time.monotonic() - started
        wait_for(lambda: requests.get(f"http://127.0.0.1:{port}/ready", timeout=5).ok, "the worker works", 240)
        looked = volume.run("ppal", "doctor", "--json", **variables).stdout
        states = {row["check"]: row["state"] for row in json.loads(looked)}
        kept = volume.run("ppal", "backup", "x.tar", **variables)
        assert kept.returncode == 0, kept.stderr
        assert (volume.folder / "x.tar").is_file(), "a relative path leads into the volume"
        family = psutil.Process(process.pid).children(recursive=True)
        first = next(p for p in family if p.cmdline()[-1:] == ["up"] and "python" in p.cmdline()[0])
        stopped = time.monotonic()
        first.send_signal(signal.SIGTERM)
        code = process.wait(60)
        stop_s = time.monotonic() - stopped
    finally:
        for member in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            member.kill()
        process.kill()
        process.wait()
    told(f"healthy after {healthy_s:.1f} s, stopped in {stop_s:.1f} s")
    assert (code, "Traceback" in log.read_text()) == (0, False), log.read_text()[-3000:]
    assert stop_s < 10, "before Docker kills it"
    assert {states[name] for name in ("database", "worker", "disk", "queue", "service")} == {"ok"}, looked
    assert states["detector"] == "warning", "it works, on a CPU"
    assert {path.stat().st_uid for path in volume.folder.rglob("*")} == {USER}


def test_it_trains_and_queries(volume, told):
    started = time.monotonic()
    done = volume.run("ppal", "simulate", "--preset", "smoke", "--strategies", "ppal", "--rounds", "2", "--seeds", "1",
                      "--out", "smoke")  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = read_json(volume.folder / "smoke" / "report" / "summary.json")
    assert summary["complete"]
    told(f"two rounds of the smoke preset in {time.monotonic() - started:.0f} s")


@pytest.mark.parametrize("words", [["up"], ["worker"]])
def test_a_folder_of_root_is_told_with_what_to_do(buildah, tmp_path, words):
    volume = Volume(buildah, tmp_path / "roots", owner=0)
    try:
        done = volume.run("ppal", *words)
    finally:
        buildah("rm", volume.container)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"chown -R {USER}" in done.stderr and "/data" in done.stderr
