"""The wheel: what is in it, that the sdist builds the same one, and that it works outside a checkout."""

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import requests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ppal_backend
from tests.servers import free_port, wait_for

ROOT = Path(__file__).parent.parent
PARTS = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "ppal_backend",
    "model_zoo",
)
NOT_FOR_USERS = ("ppal_backend/demo/", "ppal_backend/rig/")
DETECTORS = 15


def copy_of_the_checkout(folder):
    folder.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def build(kind, source, out):
    """The file that the build backend makes of a source folder, in a process of its own, without a network."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, check=True
    )
    return out / done.stdout.splitlines()[-1]


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_of_the_checkout(folder / "source"), folder / "dist")


def files_below(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip


def test_the_wheel_holds_the_package_and_the_zoo_and_nothing_else(wheel):
    found = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    package = {f"ppal_backend/{name}": path for name, path in files_below(ROOT / "ppal_backend").items()}
    wanted = {name: path for name, path in package.items() if not name.startswith(NOT_FOR_USERS)}
    wanted |= {f"ppal_backend/model_zoo/{name}": path for name, path in files_below(ROOT / "model_zoo").items()}
    assert set(found) == set(wanted)
    assert all(found[name] == path.read_bytes() for name, path in wanted.items())
    assert any(name.startswith(NOT_FOR_USERS) for name in package), "there is something to leave out"


def test_the_version_stands_in_one_place(wheel):
    metadata = next(data.decode() for name, data in contents(wheel).items() if name.endswith("METADATA"))
    assert f"\nVersion: {ppal_backend.__version__}\n" in metadata
    assert wheel.name == f"ppal_backend-{ppal_backend.__version__}-py3-none-any.whl"
    assert '\nversion = "' not in (ROOT / "pyproject.toml").read_text()
    assert f"\n## {ppal_backend.__version__}" in (ROOT / "CHANGELOG.md").read_text(), "the changelog has this version"


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    sdist = build("sdist", copy_of_the_checkout(tmp_path / "source"), tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert not {"tests", "benchmarks", "docs"} & {path.name for path in source.iterdir()}
    again = build("wheel", source, tmp_path / "again")
    assert contents(again) == contents(wheel)


@pytest.fixture(scope="module")
def ppal(wheel, tmp_path_factory):
    """The command of an environment that holds the wheel alone, with the packages that it needs beside it."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    # Behind the environment's own folder, and without the .pth files that make our checkout importable.
    (own / "needed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    (folder / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PPAL_CONFIG")}
    environment |= {"MODEL_DIR": str(folder / "data"), "PPAL_CACHE": str(folder / "cache"), "COLUMNS": "200"}

    def run(*words, start=False, **variables):
        command = [str(folder / "venv" / "bin" / "ppal"), *words]
        options = {"cwd": folder / "elsewhere", "env": {**environment, **variables}, "text": True}
        if start:
            with (folder / "log").open("w") as log:
                return subprocess.Popen(command, stdout=log, stderr=log, **options)
        return subprocess.run(command, capture_output=True, check=False, **options)

    run.folder = folder
    found = subprocess.run([str(python), "-c", "import ppal_backend; print(ppal_backend.__file__)"], cwd=folder,
                           env=environment, capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert found.strip() == str(own / "ppal_backend" / "__init__.py"), "not the checkout"
    return run


@pytest.mark.slow
def test_the_installed_wheel_answers_from_any_folder(ppal):
    assert "simulate" in ppal("--help").stdout
    listed = ppal("zoo", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert "retinanet_tiny" in listed.stdout and len(json.loads(listed.stdout)) >= DETECTORS
    looked = ppal("doctor", "--json", LABEL_STUDIO_URL="http://127.0.0.1:9")
    assert looked.returncode == 1, "there is no Label Studio"
    findings = json.loads(looked.stdout)
    assert "detector" in json.dumps(findings) and "Traceback" not in looked.stderr
    for words in (["demo", "--exit"], ["up", "--profile", "full"]):
        refused = ppal(*words)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        (line,) = refused.stderr.splitlines()
        assert line.startswith("error: expected a checkout for ppal") and "clone the repository" in line


@pytest.mark.slow
def test_the_installed_wheel_simulates(ppal):
    done = ppal("simulate", "--preset", "smoke", "--out", "smoke")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (ppal.folder / "elsewhere" / "smoke" / "report" / "report.md").is_file()


@pytest.mark.slow
def test_the_installed_wheel_serves_and_stops(ppal):
    port = free_port()
    process = ppal("up", start=True, PPAL_HOST="127.0.0.1", PPAL_PORT=str(port))
    try:
        wait_for(lambda: requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok, "the service answers", 240)
        page = requests.get(f"http://127.0.0.1:{port}/ui", timeout=30)
        assert page.ok and "<html" in page.text, "the templates travel"
        wait_for(lambda: "worker started" in (ppal.folder / "log").read_text(), "the worker works", 240)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (ppal.folder / "log").read_text()


# They name everything that any use of theirs needs; scripts/setup.sh installs the pins with --no-deps.
TOO_MUCH = {"imaug", "onedl-mmcv", "label-studio-sdk", "label-studio-ml", "rq"}
# It installs torch with what its build needs, which for CUDA are NVIDIA's libraries.
WITH_ITS_OWN = {"torch"}


@pytest.mark.parametrize("python", ["3.11.2", "3.11.14", "3.12.3"])
def test_the_pins_hold_what_they_need_on_every_python_that_is_supported(python):
    """Some packages need another one on some versions of Python only: redis did on the 3.11.2 of Debian 12."""
    environment = {"python_full_version": python, "python_version": ".".join(python.split(".")[:2]), "extra": ""}
    rows = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    pins = [Requirement(row) for row in rows if row and not row.startswith("-")]
    there = {canonicalize_name(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate(environment)}
    there |= {"torch", "onedl-mmcv", "onedl-mmdetection", "setuptools", "pip"}  # scripts/setup.sh
    missing = {}
    for name in sorted(there - TOO_MUCH - WITH_ITS_OWN):
        with suppress(PackageNotFoundError):
            needed = (Requirement(row) for row in requires(name) or ())
            needed = (r for r in needed if r.marker is None or r.marker.evaluate(environment))
            lacking = {canonicalize_name(r.name) for r in needed} - there
            missing |= {name: lacking} if lacking else {}
    assert missing == {}
