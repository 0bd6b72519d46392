"""Builds ``model_zoo/`` into the wheel, as ``ppal_backend/model_zoo``; all else stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithZoo(build_py):
    """Adds the model zoo, unless the package is installed to be edited: then it is found where it lies."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "ppal_backend" / "model_zoo"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(__file__).parent / "model_zoo", target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithZoo})
