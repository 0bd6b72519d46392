"""Steps on a real Ray cluster, with an engine that counts instead of training."""

import os

import pytest

from ppal_backend.engines.ray.cluster import Needs, RayCluster
from ppal_backend.engines.ray.tasks import StepRunner
from ppal_backend.errors import DatasetError, DetectorError, EngineUnavailable, RoundCancelled
from tests.engines.ray_nodes import CountingOptions, add_node, ray_cluster

pytestmark = pytest.mark.servers
ONE_CORE = Needs(1, 0)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(head_cpus=0) as cluster:
        assert RayCluster(cluster.address).home  # joins now, while the head is the only node: no work is done there
        add_node(cluster)
        yield cluster


@pytest.fixture
def steps(cluster):
    return StepRunner(RayCluster(cluster.address), CountingOptions())


def test_progress_comes_back_whole_and_in_order(steps, tmp_path):
    said = []
    begun, pid = steps.run("train", (300, tmp_path), tmp_path, ONE_CORE, said.append, lambda: False)
    assert [p.done for p in said] == list(range(1, 301)) and {p.total for p in said} == {300}
    assert begun == 0 and pid != os.getpid() and [p.name for p in tmp_path.iterdir()] == ["step"]


def test_a_wish_to_stop_reaches_the_node_and_the_step_goes_on_later(steps, tmp_path):
    said = []
    with pytest.raises(RoundCancelled, match="stopped before step"):
        steps.run("train", (10**6, tmp_path), tmp_path, ONE_CORE, said.append, lambda: bool(said))
    reached = int((tmp_path / "step").read_text())
    assert 0 < reached < 10**6 and said[-1].done == reached
    begun, _ = steps.run("train", (reached + 5, tmp_path), tmp_path, ONE_CORE, said.append, lambda: False)
    assert begun == reached and said[-1].done == reached + 5


def test_errors_come_back_as_they_were_raised(steps, tmp_path):
    import ray

    with pytest.raises(DatasetError, match="no images") as raised:
        steps.run("evaluate", ("no images",), tmp_path, ONE_CORE)
    assert type(raised.value) is DatasetError
    with pytest.raises(ray.exceptions.RayTaskError, match="bug"):
        steps.run("untrained", (), tmp_path, ONE_CORE)


def test_an_error_here_ends_the_step_there(steps, tmp_path):
    import ray

    def broken(progress):
        raise KeyError("the round is gone")

    with pytest.raises(KeyError, match="the round is gone"):
        steps.run("train", (10**6, tmp_path), tmp_path, ONE_CORE, broken, lambda: False)
    _, pid = steps.run("train", (10, tmp_path / "next"), tmp_path / "next", ONE_CORE, lambda _: None, lambda: False)
    assert ray.cluster_resources()["CPU"] == 1 and pid, "the core was given back"


def test_a_cluster_without_a_large_enough_node_is_waited_for(steps, tmp_path):
    with pytest.raises(EngineUnavailable, match=r"expected a node of the Ray cluster with 5 CPU cores, got .* 1 cores"):
        steps.run("train", (1, tmp_path), tmp_path, Needs(5, 0), lambda _: None, lambda: False)


def test_nodes_that_do_not_see_the_folder_are_not_used(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(StepRunner, "_sees", lambda self, node, marker: False)
    with pytest.raises(DetectorError, match=r"got none that sees it .* share MODEL_DIR"):
        steps.run("train", (1, tmp_path), tmp_path, ONE_CORE, lambda _: None, lambda: False)
