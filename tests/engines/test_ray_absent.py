"""The engine where Ray is not installed or not used as intended: clear words, before any work."""

import subprocess
import sys

import pytest

from ppal_backend.engines.local import LocalEngine
from ppal_backend.engines.ray import RayEngine
from ppal_backend.engines.ray.cluster import need_ray
from ppal_backend.errors import SettingsError
from ppal_backend.settings import load_settings
from ppal_backend.worker.round_process import _engine
from ppal_backend.worker.worker import run_worker


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def some_ray(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


def test_without_ray_the_error_says_what_to_install(no_ray):
    for call in (need_ray, RayEngine):
        with pytest.raises(SettingsError, match=r"pip install --no-deps -r requirements-ray.txt.*PPAL_ENGINE=local"):
            call()


def test_a_worker_does_not_start_without_it(no_ray, tmp_path):
    settings = load_settings(MODEL_DIR=tmp_path, engine="ray")
    with pytest.raises(SettingsError, match=r"requirements-ray\.txt"):
        run_worker(settings)
    assert not (tmp_path / "ppal.db").exists()


def test_the_setting_chooses_the_engine(some_ray, monkeypatch, tmp_path):
    assert isinstance(_engine(load_settings(MODEL_DIR=tmp_path)), LocalEngine)
    monkeypatch.setenv("PPAL_ENGINE", "ray")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    settings = load_settings(MODEL_DIR=tmp_path, gpus=2, threads=3)
    engine = _engine(settings)
    assert isinstance(engine, RayEngine)
    assert engine._cluster._address == "10.0.0.1:6379"
    assert (engine._options.processes, engine._options.threads) == (2, 3)
    monkeypatch.setenv("PPAL_ENGINE", "spark")
    with pytest.raises(SettingsError, match="'local' or 'ray'"):
        load_settings(MODEL_DIR=tmp_path)


def test_an_address_of_ray_client_is_refused(some_ray):
    with pytest.raises(SettingsError, match=r"expected RAY_ADDRESS as host:port, got 'ray://10.0.0.1:10001'"):
        RayEngine("ray://10.0.0.1:10001")


def test_the_rooms_of_a_worker_load_nothing_of_this_engine_nor_torch():
    """Without PPAL_ENGINE=ray no line of it is read; and how idle threads wait is set before torch is there."""
    code = (
        "import sys, ppal_backend.worker.worker, ppal_backend.worker.round_process\n"
        "unwanted = ('torch', 'ray', 'ppal_backend.engines.ray')\n"
        "print([name for name in sys.modules if name in unwanted])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_ray_is_not_imported_before_it_is_used(some_ray):
    loaded = "ray" in sys.modules
    RayEngine()
    assert ("ray" in sys.modules) == loaded
