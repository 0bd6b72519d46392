"""Builds the Dockerfile as it stands, without a registry and without Docker: buildah in a chroot, as root.

The base image is a stand-in from debootstrap with the distribution's own Python, to which this machine's settings of
apt and pip are copied. Needs root, ``buildah`` and ``debootstrap`` (Debian's packages).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE, ENVIRONMENT, IMAGE = "localhost/ppal-test-base", "localhost/ppal-test-environment", "localhost/ppal-test"
TOOLS = ("buildah", "debootstrap")
PYTHON = "ca-certificates,python3,python3-dev,python3-venv"
PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip", "/root/.config/pip", "/root/.pip")
APT_FILES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d", "/etc/apt/trusted.gpg.d", "/etc/apt/keyrings",
             "/usr/share/keyrings", "/etc/ssl/certs/ca-certificates.crt")  # fmt: skip


def what_is_missing():
    """Why no image can be built here; empty where one can."""
    if os.geteuid() != 0:
        return "builds as root only: buildah works in a chroot"
    gone = [name for name in TOOLS if shutil.which(name) is None]
    return f"expected {' and '.join(gone)}, got none (apt-get install {' '.join(gone)})" if gone else ""


class Buildah:
    """An image store of its own.

    Args:
        store: folder of the store; the base image in it is used again.
        wheels: folder with mmcv's wheel, so that nothing is compiled.
    """

    def __init__(self, store, wheels):
        self.store, self.wheels = store, wheels
        store.mkdir(parents=True, exist_ok=True)
        self.command = ["buildah", "--root", str(store / "root"), "--runroot", str(store / "run")]

    def __call__(self, *words, **options):
        command = [*self.command, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()

    def base(self):
        """Make the stand-in of the base image unless there is one."""
        if BASE in self("images", "--format", "{{.Name}}"):
            return
        release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M))
        mirror = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
                                capture_output=True, text=True, check=True).stdout.split()[0]  # fmt: skip
        tree = self.store / "base"
        shutil.rmtree(tree, ignore_errors=True)
        command = [
            "debootstrap",
            "--variant=minbase",
            f"--include={PYTHON}",
            release["VERSION_CODENAME"],
            str(tree),
            mirror,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        for name in (*PIP_FILES, *APT_FILES):
            copy(Path(name), tree / name[1:])
        for path in Path("/etc/apt/apt.conf.d").iterdir():
            if re.fullmatch(r"(\s*(//.*|Acquire::.*)?\n)*", path.read_text()):  # how to fetch, no hooks
                copy(path, tree / str(path)[1:])
        shutil.rmtree(tree / "var/cache/apt/archives", ignore_errors=True)
        container = self("from", "scratch")
        self("copy", "-q", container, str(tree), "/")
        for name, value in os.environ.items():
            if name.startswith("PIP_"):
                self("config", "--env", f"{name}={value}", container)
        self("commit", "-q", "--rm", container, BASE)
        shutil.rmtree(tree)

    def build(self, context, **arguments):
        """Build the Dockerfile of a folder; what buildah said, and the seconds it took."""
        options = self.indexes()
        named = {"BASE": BASE, "PPAL_WHEELS": "/wheels", "TORCH_INDEX_URL": os.environ.get("TORCH_INDEX_URL", "")}
        options += [f"--build-arg={name}={value}" for name, value in {**named, **arguments}.items()]
        started = time.monotonic()
        command = (
            "bud",
            "--format=docker",
            "--isolation=chroot",
            "--layers",
            f"--volume={self.wheels}:/wheels:ro",
            *options,
        )
        # The first stage has a name, or clear() would take it for something that is left over.
        said = self(*command, "--target=environment", "-t", ENVIRONMENT, str(context))
        said += self(*command, "-t", IMAGE, str(context))
        return said, time.monotonic() - started

    def indexes(self):
        """Options that show a build the folders which pip's settings name."""
        return [f"--volume={folder}:{folder}:ro" for folder in local_indexes()]

    def clear(self):
        """Remove containers, also those of runs that were cut off, and images that nothing is built from."""
        self("rm", "--all")
        self("rmi", "--prune")

    def inspect(self):
        """The image's configuration as Docker writes it."""
        return json.loads(self("inspect", "--type", "image", IMAGE))["Docker"]

    def layers(self):
        """MB of every layer on top of the base, with the command that made it, from below."""
        sizes = {row["id"]: row.get("diff-size", 0) / 1e6
                 for row in json.loads((self.store / "root/overlay-layers/layers.json").read_text())}  # fmt: skip
        parents = {row["id"]: row.get("parent") for row in
                   json.loads((self.store / "root/overlay-layers/layers.json").read_text())}  # fmt: skip
        images = json.loads((self.store / "root/overlay-images/images.json").read_text())
        layer = next(row["layer"] for row in images if f"{IMAGE}:latest" in row.get("names", ()))
        found = []
        while layer:
            found.append(sizes[layer])
            layer = parents[layer]
        return found[::-1]


def copy(source, target):
    """A file or folder, if it is there."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def local_indexes():
    """Folders of this machine that pip's settings name."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    paths = (Path(*Path(path).parts[:3]) for path in re.findall(r"(?<![\w:/])(?:file://)?(/[\w.+/-]+)", listed.stdout))
    return sorted({str(path) for path in paths if path.is_dir() and path.parts[1] != "etc"})
