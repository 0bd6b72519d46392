"""``scripts/setup.sh mmcv``: a ready wheel is taken where one works, and what is not there costs seconds."""

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
VERSIONS = dict(line.split("=", 1) for line in (ROOT / "scripts/versions.env").read_text().splitlines()
                if "=" in line and not line.startswith("#"))  # fmt: skip
MMCV = VERSIONS["MMCV_VERSION"]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
TORCH = """
__version__ = "2.13.0+cpu"
class version: cuda = None
class cuda: is_available = staticmethod(lambda: False)
"""
EXTENSION = """
#include <Python.h>
static PyObject *none(PyObject *self, PyObject *args) { return PyUnicode_FromString("not available"); }
static PyMethodDef methods[] = {{"get_compiling_cuda_version", none, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ext", 0, -1, methods};
PyMODINIT_FUNC PyInit__ext(void) { return PyModule_Create(&module); }
"""


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """A compiled module with the name of mmcv's operators."""
    folder = tmp_path_factory.mktemp("ext")
    (folder / "ext.c").write_text(EXTENSION)
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(["gcc", "-shared", "-fPIC", include, "ext.c", "-o", "_ext.so"], cwd=folder, check=True)
    return (folder / "_ext.so").read_bytes()


def write_wheel(folder, extension):
    """A wheel of mmcv that holds its operators alone."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"onedl_mmcv-{MMCV}.dist-info"
    files = {
        "mmcv/__init__.py": b"", f"mmcv/_ext{sysconfig.get_config_var('EXT_SUFFIX')}": extension,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: onedl-mmcv\nVersion: {MMCV}\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {TAG}-{TAG}-linux_x86_64\n".encode(),
    }  # fmt: skip
    record = io.StringIO()
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        csv.writer(record).writerow([name, f"sha256={digest}", len(data)])
    path = folder / f"onedl_mmcv-{MMCV}-{TAG}-{TAG}-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.getvalue().encode()}.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with pip and something that says it is torch."""
    folder = tmp_path_factory.mktemp("setup") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (next(folder.glob("lib/python*/site-packages")) / "torch.py").write_text(TORCH)
    return folder


@pytest.fixture
def setup(environment, tmp_path):
    """Runs the script on a checkout that has only what it reads."""
    place = environment.parent
    subprocess.run([environment / "bin/python", "-m", "pip", "uninstall", "-q", "-y", "onedl-mmcv"], check=True)
    shutil.copytree(ROOT / "scripts", place / "scripts", dirs_exist_ok=True)

    def run(**variables):
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        # Nothing but the places under test is asked.
        offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "scripts/setup.sh", "mmcv"], cwd=place, check=False, capture_output=True, text=True,
            env={**kept, **offline, "PYTHON": sys.executable, "PPAL_CACHE": str(tmp_path / "cache"), **variables},
        )  # fmt: skip
        return done, time.monotonic() - started

    run.installed = lambda: list(environment.glob("lib/python*/site-packages/mmcv/_ext*.so"))
    run.kept = lambda: list((tmp_path / "cache").glob("wheels/*/*.whl"))
    return run


@pytest.fixture
def index(tmp_path):
    """A folder served as a package index, and its address."""
    folder = tmp_path / "simple" / "onedl-mmcv"
    folder.mkdir(parents=True)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    server.server_close()


def test_a_wheel_of_an_index_is_taken_and_kept_and_nothing_is_compiled(setup, index, operators):
    folder, address = index
    wheel = write_wheel(folder, operators)
    done, _ = setup(PPAL_WHEELS=address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"looking for a ready wheel of mmcv {MMCV} in {address}" in done.stdout
    assert "compiling" not in done.stdout and len(setup.installed()) == 1
    assert [path.name for path in setup.kept()] == [wheel.name]
    wheel.unlink()
    again, _ = setup(PPAL_WHEELS=address)
    assert again.returncode == 0 and "looking" not in again.stdout, "the next checkout asks nobody"


def test_a_wheel_of_a_folder_is_taken_also_from_one_named_as_ours(setup, tmp_path, operators):
    write_wheel(tmp_path / "wheels" / f"py{TAG[2:]}-torch2.13.0+cpu-mmcv{MMCV}-cpu-x86_64", operators)
    done, _ = setup(PPAL_WHEELS=str(tmp_path / "wheels"))
    assert done.returncode == 0 and len(setup.installed()) == 1, done.stdout + done.stderr


def test_a_wheel_that_does_not_load_is_left_and_the_next_place_asked(setup, index, tmp_path, operators):
    folder, address = index
    write_wheel(tmp_path / "broken", b"compiled for another torch")
    write_wheel(folder, operators)
    done, _ = setup(PPAL_WHEELS=f"{tmp_path / 'broken'}\n{address}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the wheel from there does not work with this torch: ImportError" in done.stdout
    (installed,) = setup.installed()
    assert installed.read_bytes() == operators


def test_one_without_cuda_is_no_wheel_for_a_gpu(setup, tmp_path, operators):
    write_wheel(tmp_path / "wheels", operators)
    done, _ = setup(PPAL_WHEELS=str(tmp_path / "wheels"), FORCE_CUDA="1")
    assert "AssertionError: they were compiled without CUDA" in done.stdout
    assert "compiling mmcv's cuda ops once" in done.stdout and setup.kept() == []


@pytest.mark.parametrize("kind", ["refused", "silent", "empty folder", "none"])
def test_where_no_wheel_is_to_be_had_it_compiles_within_seconds(setup, tmp_path, kind):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {"refused": "http://127.0.0.1:9/simple", "none": "none", "empty folder": str(tmp_path / "nothing"),
                 "silent": f"http://127.0.0.1:{silent.getsockname()[1]}/simple"}[kind]  # fmt: skip
        (tmp_path / "nothing").mkdir()
        done, seconds = setup(PPAL_WHEELS=place)
    assert "compiling mmcv's cpu ops once" in done.stdout, "and here that cannot be, without an index"
    assert done.returncode == 1 and "setup: mmcv did not compile; the whole log is" in done.stderr
    assert seconds < 30


def test_without_a_wheel_and_a_compiler_it_says_what_is_missing(setup, environment, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "basename", "dirname", "mktemp", "rm", "mkdir", "tail", "nproc", "sleep"):
        (tools / name).symlink_to(shutil.which(name))
    done, _ = setup(PPAL_WHEELS="none", PATH=str(tools))
    assert done.returncode == 1
    assert "expected gcc and g++ to compile mmcv, or a ready wheel in PPAL_WHEELS, got neither" in done.stderr


def test_without_a_gpu_in_sight_the_architectures_are_named(setup, tmp_path):
    """torch otherwise asks the GPUs that are there, of which a build sees none."""
    source = tmp_path / "source" / f"onedl_mmcv-{MMCV}"
    source.mkdir(parents=True)
    (source / "setup.py").write_text("import os; raise SystemExit('asked for ' + os.environ['TORCH_CUDA_ARCH_LIST'])")
    archive = shutil.make_archive(str(source), "gztar", source.parent, source.name)
    options = {"PPAL_WHEELS": "none", "FORCE_CUDA": "1", "PIP_FIND_LINKS": str(Path(archive).parent)}
    assert f"asked for {VERSIONS['CUDA_ARCHITECTURES'].strip(chr(34))}" in setup(**options)[0].stderr
    assert "asked for 12.0" in setup(**options, TORCH_CUDA_ARCH_LIST="12.0")[0].stderr


@pytest.mark.parametrize(("backend", "label_studio"), [(0, 0), (1, 0), (0, 3)])
def test_both_environments_are_made_side_by_side_and_either_failure_ends_it(tmp_path, backend, label_studio):
    """With the two steps replaced: each waits for a sign of the other, which in turn would wait for ever."""
    script = (ROOT / "scripts/setup.sh").read_text()
    for name, other, code in (("backend", "label_studio", backend), ("label_studio", "backend", label_studio)):
        waiting = f"touch {name}; until [ -e {other} ]; do sleep 0.05; done"
        stub = f"{name}() {{ {waiting}; echo {name} made; return {code}; }}\n"
        script, changed = re.subn(rf"^{name}\(\) {{\n.*?^}}\n", lambda _, stub=stub: stub, script, flags=re.M | re.S)
        assert changed == 1
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup.sh").write_text(script)
    shutil.copy(ROOT / "scripts/versions.env", tmp_path / "scripts")
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True, check=False,
                          timeout=60, env={**os.environ, "PYTHON": sys.executable})  # fmt: skip
    assert done.returncode == (backend or label_studio), done.stderr
    assert "backend made" in done.stdout
