"""A node of a Ray cluster dies: the round goes on elsewhere and ends with what it would have ended with."""

import time
from dataclasses import replace

import pytest

from ppal_backend.engines.local import LocalEngine
from ppal_backend.engines.ray import RayEngine, tasks
from ppal_backend.engines.ray.cluster import Needs, RayCluster
from ppal_backend.engines.ray.tasks import StepRunner
from ppal_backend.rounds.ports import TrainingFiles
from tests.detector.shapes import CLASSES, write_set
from tests.engines.ray_nodes import CountingOptions, add_node, is_at, kill, ray_cluster
from tests.engines.ray_rig import SMALL_SPEC, SMALL_STEPS, assert_same, make_model, make_pool, make_zoo
from tests.servers import wait_for

pytestmark = [pytest.mark.faults, pytest.mark.servers]


@pytest.fixture(scope="module")
def cluster():
    """A head that does no work itself, so that a test knows where work is done."""
    with ray_cluster(head_cpus=0) as cluster:
        assert RayCluster(cluster.address).home  # joins now, while the head is the only node: it is never killed
        yield cluster


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("ray") / "zoo")


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    return make_model(zoo, tmp_path_factory.mktemp("model"))


def test_a_node_killed_while_a_pool_is_looked_at(cluster, zoo, model, tmp_path, recovered, caplog, monkeypatch):
    pool = make_pool(tmp_path / "pool", 240)
    wanted = list(LocalEngine(zoo, 1).infer(SMALL_SPEC, model, pool, lambda _: None, lambda: False))
    nodes, killed = [add_node(cluster), add_node(cluster)], []
    monkeypatch.setattr(tasks, "_POLL_S", 0.05)

    def kill_one_at_work():
        at_work = [] if killed else [node for node in nodes if is_at(node, "ShardWorker.work")]
        if at_work:
            nodes.remove(at_work[0])
            killed.append(kill(cluster, at_work[0]))
        return False

    found = list(RayEngine(cluster.address, zoo).infer(SMALL_SPEC, model, pool, lambda _: None, kill_one_at_work))
    recovered(time.monotonic() - killed[0])
    assert_same(found, wanted)
    assert "a process of the Ray cluster was lost with shard" in caplog.text
    cluster.remove_node(nodes[0])


def test_a_pool_left_half_way_gives_its_places_back(cluster, zoo, model, tmp_path):
    import ray

    node, pool = add_node(cluster), make_pool(tmp_path / "pool", 80)
    answers = RayEngine(cluster.address, zoo).infer(SMALL_SPEC, model, pool, lambda _: None, lambda: False)
    next(answers)
    assert ray.available_resources().get("CPU", 0) == 0
    answers.close()
    wait_for(lambda: ray.available_resources().get("CPU", 0) == 1, "the core is free again")
    cluster.remove_node(node)


def test_a_node_killed_while_a_step_runs(cluster, tmp_path, recovered, caplog):
    """Another node goes on where the folder says, and the step is done once."""
    nodes, steps, moment = [add_node(cluster)], [], []

    def note(progress):
        steps.append(progress.done)
        if not moment:
            moment.append(kill(cluster, nodes.pop()))
            nodes.append(add_node(cluster))

    runner = StepRunner(RayCluster(cluster.address), CountingOptions())
    begun, _ = runner.run("train", (5_000, tmp_path), tmp_path, Needs(1, 0), note, lambda: False)
    recovered(time.monotonic() - moment[0])
    assert 0 < begun < 5_000 and steps[-1] == 5_000
    assert "try 1 of step 'train' in the Ray cluster was lost" in caplog.text and "try 2" not in caplog.text
    cluster.remove_node(nodes[0])


@pytest.mark.slow
def test_a_node_killed_while_it_trains(cluster, zoo, tmp_path, recovered):
    """Another node takes the training up at its last checkpoint."""
    train_json, folder, steps, moment = write_set(tmp_path / "data", 12), tmp_path / "train", [], []
    nodes, spec = [add_node(cluster)], replace(SMALL_SPEC, max_iterations=None)
    after = []

    def note(progress):
        steps.append(progress.done)
        if moment:
            after.append(progress.done)
        elif list(folder.glob("iter_*.pth")):
            moment.append(kill(cluster, nodes.pop()))
            nodes.append(add_node(cluster))

    trained = RayEngine(cluster.address, zoo).train(
        spec, CLASSES, TrainingFiles(train_json), folder, note, lambda: False
    )
    recovered(time.monotonic() - moment[0])
    assert trained.facts["iterations"] == steps[-1] == SMALL_STEPS
    assert min(after) > 1, "it began anew"
    assert trained.model.checkpoint == str(folder / "final.pth")
