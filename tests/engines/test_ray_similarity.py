"""CCMS in shares, on a cluster that is played: the same similarities and the same choice as in one process."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ppal_backend.acquisition.ccms import LazySimilarity
from ppal_backend.acquisition.ccms.objects import pack_objects
from ppal_backend.acquisition.strategies import get_strategy
from ppal_backend.engines.ray.similarity import RaySimilarity
from ppal_backend.errors import DetectorError
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import Ports
from ppal_backend.rounds.run import run_round
from tests.acquisition.pools import context as make_context
from tests.acquisition.pools import random_pool
from tests.engines.test_ray_shards import RayError, RayTaskError
from tests.reference import ccms as reference
from tests.reference import pipeline
from tests.rounds.fakes import SPEC, FakeWorld


class PlayedRay:
    """Actors are objects of this process; ``lost`` stands for nodes that die again and again."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, processes=3):
        self.processes, self.calls, self.shares, self.lost = processes, 0, [], False

    def put(self, value):
        return value

    def get(self, answers):
        if self.lost:
            raise RayError("its node died")
        return answers

    def start(self, cls, options):
        assert options == {"max_restarts": 3, "max_task_retries": 3}

        def remote(share, device, memory_gib):
            self.shares.append(share.num_images)
            actor = cls(share, device, memory_gib)
            return SimpleNamespace(against=SimpleNamespace(remote=lambda others: self._call(actor, others)))

        return SimpleNamespace(remote=remote)

    def _call(self, actor, others):
        self.calls += 1
        return actor.against(others)

    def similarity(self, images, threshold=0.05, device=None, memory_gib=None, *, metric="auto", max_detections=100):
        packed = pack_objects(images, threshold, "cpu", metric, max_detections)
        return RaySimilarity(self, self.start, self.processes, "cpu", packed, memory_gib)


@pytest.mark.parametrize("processes", [0, 1, 3, 50])
@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_rows_are_those_of_the_loops_and_of_one_process(processes, metric):
    images = random_pool(np.random.default_rng(processes), 21, 4, 7)
    ray = PlayedRay(processes)
    shared, alone = ray.similarity(images, metric=metric), LazySimilarity(images, metric=metric)
    order = np.random.default_rng(1).permutation(21)[:15]
    np.testing.assert_allclose(shared.rows(order), alone.rows(order), atol=1e-6)
    np.testing.assert_array_equal(shared.block(order, [2, 5]), alone.block(order, [2, 5]))
    np.testing.assert_array_equal(shared.panel([2, 5])(order), alone.panel([2, 5])(order))
    if metric == "cosine":
        np.testing.assert_allclose(shared.rows(range(21)), reference.similarity(images), atol=1e-5)
    assert sum(ray.shares) == 21 == len(shared) and len(ray.shares) == min(max(1, processes), 21)


def test_images_without_objects_and_no_rows():
    images = [replace_scores(d) for d in random_pool(np.random.default_rng(3), 6, 2, 4)]
    similarity = PlayedRay(2).similarity(images)
    np.testing.assert_array_equal(similarity.rows(range(6)), 2.0 * np.eye(6))
    assert similarity.rows([]).shape == (0, 6)


def replace_scores(detections):
    return replace(detections, scores=np.zeros_like(detections.scores))


@pytest.mark.parametrize("seed", range(4))
def test_ppal_chooses_what_the_loops_choose(seed):
    context, ray = make_context(seed, images=50, classes=3), PlayedRay()
    strategy = get_strategy("ppal", memory_gib=1e-6, similarity=ray.similarity)
    chosen = strategy.query(context, 6, np.random.default_rng(0))
    assert list(chosen.image_ids) == pipeline.ppal(context, 6) and ray.calls > 0


@pytest.mark.parametrize("seed", range(4))
def test_labelled_images_are_compared_by_the_cluster_too(seed):
    context, ray = make_context(seed, images=50, classes=3), PlayedRay()
    strategy = get_strategy("ppal+labelled", memory_gib=1e-6, similarity=ray.similarity)
    chosen = strategy.query(context, 6, np.random.default_rng(0))
    assert list(chosen.image_ids) == pipeline.ppal_labelled(context, 6)
    assert sum(ray.shares) == 24, "candidates alone are spread over the cluster"


def test_what_fits_into_a_matrix_does_not_go_to_the_cluster():
    ray = PlayedRay()
    get_strategy("ppal", similarity=ray.similarity).query(make_context(0), 6, np.random.default_rng(0))
    assert ray.shares == []


def test_a_round_uses_what_it_is_plugged_into(tmp_path):
    ray, spec = PlayedRay(), replace(SPEC, strategy_options={"memory_gib": 1e-7})
    queues = []
    for number, similarity in enumerate((ray.similarity, None)):
        world = FakeWorld()
        ports = Ports(world, world, world, world, similarity=similarity)
        queues.append(run_round(spec, RoundFolder(tmp_path / str(number)), ports).queue)
    assert queues[0] == queues[1] and ray.calls > 0


def test_processes_that_are_lost_for_good_are_told():
    ray = PlayedRay()
    similarity = ray.similarity(random_pool(np.random.default_rng(0), 6, 2, 4))
    ray.lost = True
    with pytest.raises(DetectorError, match=r"lost 4 times \(its node died\)"):
        similarity.rows([0])
