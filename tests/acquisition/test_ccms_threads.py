"""CCMS on several threads: the same to the bit as on one, and no thread waits for the work of another."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ppal_backend.acquisition.ccms import LazySimilarity, matrix, similarity_matrix, tiles
from ppal_backend.acquisition.ccms.objects import pack_objects
from ppal_backend.acquisition.ccms.tiles import in_order
from tests.acquisition.pools import random_pool
from tests.reference import ccms as reference

CPU = torch.device("cpu")
MANY = 1e12


@pytest.fixture
def threads():
    """Sets torch's threads, and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def always(monkeypatch):
    """Threads are used however small the work, and tiles are so small that there is enough of it."""
    monkeypatch.setattr(tiles, "_WORTH_THREADS", 1)
    monkeypatch.setattr(matrix, "_CPU_TILE", 16)
    monkeypatch.setattr(matrix, "_LAZY_CPU_TILE", 16)


@pytest.mark.parametrize("metric", ["cosine", "kl"])
@pytest.mark.parametrize("classes", [1, 6])
def test_any_number_of_threads_gives_the_same_bits(classes, metric, threads, always):
    images = random_pool(np.random.default_rng(classes), 60, classes, 9)
    others = pack_objects(random_pool(np.random.default_rng(9), 20, classes, 9), metric=metric)
    found = []
    for count in (1, 2, 5):
        threads(count)
        lazy = LazySimilarity(images, metric=metric)
        part = lazy.block(range(7, 50), range(3, 40)).numpy(), lazy.against(others).numpy()
        found.append((similarity_matrix(images, metric=metric), lazy.rows(range(60)).numpy(), *part))
        assert torch.get_num_threads() == count
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(found[2][0], reference.similarity(images, metric=metric), atol=1e-5)


def test_a_slow_unit_holds_up_none_but_its_own_thread(threads):
    """With one product for all threads a core that is busy with something else makes all of them wait."""
    threads(2)
    later = threading.Event()

    def work(unit, space):
        if unit == 0:
            assert later.wait(20), "unit 0 was waited for before unit 2 began"
        if unit == 2:
            later.set()
        return unit

    assert list(in_order(work, range(6), CPU, MANY)) == list(range(6))


def test_units_are_computed_at_the_same_time_each_by_one_thread_and_few_ahead(threads):
    threads(3)
    together, ahead = threading.Barrier(3, timeout=20), []

    def work(unit, space):
        if unit < 3:
            together.wait()
        return unit, torch.get_num_threads(), threading.get_ident()

    def units():
        for unit in range(40):
            ahead.append(unit)
            yield unit

    for n, (unit, own, ident) in enumerate(in_order(work, units(), CPU, MANY)):
        assert (unit, own) == (n, 1) and ident != threading.get_ident()
        assert len(ahead) <= n + 5, "scratch memory is that of 4 units"


def test_scratch_memory_is_not_used_again_before_its_result_was(threads):
    threads(2)

    def work(unit, space):
        return space.get("x", 4).fill_(unit)

    assert [float(found.sum()) for found in in_order(work, range(50), CPU, MANY)] == [4.0 * n for n in range(50)]


def test_an_error_in_a_unit_comes_out_and_threads_are_as_before(threads):
    threads(2)

    def work(unit, space):
        if unit == 5:
            raise RuntimeError("unit 5")
        return unit

    with pytest.raises(RuntimeError, match="unit 5"):
        list(in_order(work, range(100), CPU, MANY))
    assert torch.get_num_threads() == 2
    walk = in_order(work, range(5), CPU, MANY)
    next(walk)
    walk.close()
    assert torch.get_num_threads() == 2


def test_little_work_is_done_in_the_calling_thread(threads):
    threads(2)
    idents = list(in_order(lambda unit, space: threading.get_ident(), range(3), CPU, 100.0))
    assert set(idents) == {threading.get_ident()}


@pytest.mark.parametrize(("free_gib", "side"), [(80.0, 8192), (8.0, 8192), (2.0, 4096), (0.01, 256)])
def test_tiles_fit_what_a_gpu_has_free(free_gib, side, monkeypatch):
    """24 bytes for each cell of a product, in half of what is free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * 2**30), 0))
    features = SimpleNamespace(is_cuda=True, device="cuda:0", numel=lambda: 10_000)
    objects = SimpleNamespace(left=features, right=features)
    assert matrix._tile_side(objects, None, 0, 768) == side
