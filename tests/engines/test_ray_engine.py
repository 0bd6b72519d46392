"""The Ray engine on a real cluster of two nodes: what comes back is what the local engine says."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ppal_backend.engines.local import LocalEngine
from ppal_backend.engines.ray import RayEngine
from ppal_backend.engines.ray.node import FileStamp
from ppal_backend.errors import CheckpointError, EngineUnavailable, RoundCancelled
from ppal_backend.rounds.ports import TrainingFiles
from tests.detector.shapes import CLASSES, write_set
from tests.engines.ray_nodes import add_node, ray_cluster
from tests.engines.ray_rig import SMALL_SPEC, SMALL_STEPS, assert_same, make_model, make_pool, make_zoo

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster() as cluster:
        add_node(cluster)
        yield cluster


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("ray") / "zoo")


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    return make_model(zoo, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def wanted(zoo, model, pool):
    """What the local engine says of the pool."""
    return list(LocalEngine(zoo, 1).infer(SMALL_SPEC, model, pool, lambda _: None, lambda: False))


@pytest.fixture
def engine(cluster, zoo):
    return RayEngine(cluster.address, zoo)


def infer(engine, model, pool, on_progress=lambda _: None, should_stop=lambda: False):
    return list(engine.infer(SMALL_SPEC, model, pool, on_progress, should_stop))


def test_a_pool_on_two_nodes_gives_what_one_process_gives(engine, model, pool, wanted, caplog):
    said = []
    handler = signal.getsignal(signal.SIGTERM)
    assert_same(infer(engine, model, pool, said.append), wanted)
    assert [(p.step, p.done, p.total) for p in said] == [("infer", 20, 40), ("infer", 40, 40)]
    assert len(wanted) == 39 and f"task {pool[9].image_id} is left without predictions" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is handler, "Ray took the signal that stops a round"


def test_nodes_without_the_files_get_their_bytes(engine, model, pool, wanted, monkeypatch):
    true = FileStamp.of
    monkeypatch.setattr(FileStamp, "of", lambda path: replace(true(path), mtime_ns=1))  # in this process alone
    assert_same(infer(engine, model, pool), wanted)


def test_nodes_read_what_they_share(engine, model, pool, wanted, monkeypatch):
    def refuse(paths):
        raise AssertionError("sent as bytes")

    monkeypatch.setattr("ppal_backend.engines.ray.read_files", refuse)
    assert_same(infer(engine, model, pool[:12]), wanted[:11])


def test_a_damaged_checkpoint_is_told_as_by_the_local_engine(engine, model, pool, tmp_path):
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"damaged\.pth"):
        infer(engine, replace(model, checkpoint=str(damaged)), pool)


def test_an_empty_pool_asks_nothing_of_the_cluster(engine, model):
    assert infer(engine, model, []) == []


def test_what_the_cluster_is_too_small_for_waits_for_a_larger_node(engine, cluster, zoo, model, pool, tmp_path):
    with pytest.raises(EngineUnavailable, match=r"expected a node of the Ray cluster with 1 GPUs .* 0 GPUs, 1 cores"):
        list(engine.infer(replace(SMALL_SPEC, device="cuda"), model, pool, lambda _: None, lambda: False))
    two = RayEngine(cluster.address, zoo, processes=2)
    with pytest.raises(EngineUnavailable, match=r"with 2 CPU cores, got .*lower PPAL_GPUS"):
        train(two, tmp_path)


def train(engine, folder, on_progress=lambda _: None, should_stop=lambda: False, spec=SMALL_SPEC):
    data = folder / "data"
    train_json = data / "coco.json" if data.exists() else write_set(data, 12, empty_every=6)
    return engine.train(spec, CLASSES, TrainingFiles(train_json), folder / "train", on_progress, should_stop)


def test_a_training_in_the_cluster_is_the_training_here(engine, zoo, tmp_path):
    import torch

    said = []
    there = train(engine, tmp_path / "there", said.append)
    here = train(LocalEngine(zoo, 1), tmp_path / "here")
    assert there.model.difficulty == pytest.approx(here.model.difficulty, abs=1e-6)
    assert there.facts["loss"] == pytest.approx(here.facts["loss"], rel=1e-6)
    assert there.model.checkpoint == str(tmp_path / "there" / "train" / "final.pth")
    a, b = (torch.load(t.model.checkpoint, weights_only=True)["state_dict"] for t in (there, here))
    assert a.keys() == b.keys() and all(torch.allclose(a[k].float(), b[k].float(), atol=1e-6) for k in a)
    assert (said[-1].step, said[-1].done, said[-1].total) == ("train", 6, 6)
    assert not list(Path(there.model.checkpoint).parent.glob(".seen-*"))
    figures = engine.evaluate(SMALL_SPEC, there.model, tmp_path / "there" / "data" / "coco.json")
    assert figures == LocalEngine(zoo, 1).evaluate(SMALL_SPEC, there.model, tmp_path / "there" / "data" / "coco.json")


@pytest.mark.slow
def test_a_training_is_stopped_and_goes_on(engine, tmp_path):
    steps, long = [], replace(SMALL_SPEC, max_iterations=None)
    stop = threading.Event()

    def note(progress):
        steps.append(progress.done)
        stop.set()

    with pytest.raises(RoundCancelled):
        train(engine, tmp_path, note, stop.is_set, long)
    left = (tmp_path / "train").glob("iter_*.pth")  # the one before too, where it was stopped just after a save
    begun = max(int(path.stem.removeprefix("iter_")) for path in left)
    assert 0 < begun < SMALL_STEPS
    later = []
    train(engine, tmp_path, lambda p: later.append(p.done), spec=long)
    assert begun < min(later) and max(later) == SMALL_STEPS


@pytest.mark.slow
def test_two_processes_train_on_a_node_of_two_cores(cluster, zoo, tmp_path):
    node = add_node(cluster, 2)
    try:
        trained = train(RayEngine(cluster.address, zoo, processes=2), tmp_path)
        assert trained.facts["iterations"] == 6 and len(trained.model.difficulty) == 3
        assert all(0 < d < 1 for d in trained.model.difficulty)
    finally:
        cluster.remove_node(node)


def test_a_secret_of_the_worker_does_not_reach_ray(engine, cluster, model, pool, monkeypatch):
    import ray

    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "a-token-nobody-may-see")
    infer(engine, model, pool[:4])
    logs = [path for path in Path(cluster.head_node.get_session_dir_path()).rglob("*") if path.is_file()]
    assert len(logs) > 5
    assert not [path for path in logs if b"a-token-nobody-may-see" in path.read_bytes()]
    environment = ray.get(ray.remote(num_cpus=0)(_environment).remote())
    assert "a-token-nobody-may-see" not in environment


def _environment():
    return list(os.environ.values())


def test_similarities_from_two_nodes_are_those_of_one_process(engine, cluster):
    import numpy as np

    from ppal_backend.acquisition.ccms import LazySimilarity
    from tests.acquisition.pools import random_pool

    images = random_pool(np.random.default_rng(0), 120, 5, 12)
    shared, alone = engine.similarity(images), LazySimilarity(images)
    assert len(shared._workers) == 2
    np.testing.assert_allclose(shared.rows(range(120)), alone.rows(range(120)), atol=1e-6)
