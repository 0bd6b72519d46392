"""The acquisition benchmark runs, reports the agreed keys, and its yardstick computes the same similarity."""

import numpy as np
import pytest

from benchmarks import acquisition
from benchmarks.acquisition import plain_similarity
from ppal_backend.acquisition.ccms import similarity_matrix
from tests.reference import ccms as reference

KEYS = (
    *("ccms_ratio_400", "ccms_9460_s", "ccms_9460_gemm_share", "select_9460_s", "peak_gib_9460"),
    *("lazy_40000_s", "lazy_40000_gib"),
)


def test_yardstick_agrees_with_the_loops_and_with_ours():
    pool = acquisition.synthetic_pool(6)
    wanted = reference.similarity(pool)
    np.testing.assert_allclose(plain_similarity(pool), wanted, atol=1e-5)
    np.testing.assert_allclose(similarity_matrix(pool), wanted, atol=1e-5)


def test_report_has_every_key_and_counts_real_work():
    report = acquisition.run(sizes=(60, 120), ratio_size=20, refinement_size=80, classes_size=70)
    assert set(KEYS) <= set(report)
    first, second = report["table"]
    assert (first["images"], first["chosen"], second["chosen"]) == (60, 15, 30)
    assert 3 < second["useful_gflop"] / first["useful_gflop"] < 5.5
    assert report["ratio"]["largest_difference"] < 1e-5
    refined = report["refinement"]
    assert max(refined["fasterpam_cost"], refined["kmedoids_cost"]) <= refined["greedy_cost"]
    assert "| 60 |" in acquisition.table(report) and "| few | 0.3" in acquisition.table(report)
    zipf, even, few = report["classes"]
    assert zipf["largest_class"] == pytest.approx(0.2, abs=0.05), "a fifth of all objects"
    assert even["largest_class"] < 0.05 and even["useful_gflop"] < zipf["useful_gflop"] < few["useful_gflop"]


def test_exponent_of_a_square_law():
    rows = [{"images": n, "s": 3e-6 * n**2} for n in (10, 100, 1000)]
    assert abs(acquisition.exponent(rows, "s") - 2) < 1e-9


def test_one_thread_and_two_take_turns_beside_a_busy_process():
    found = acquisition.measure_neighbour(60, turns=2)
    assert found["one_thread_s"] > 0 and found["ratio"] == found["two_threads_s"] / found["one_thread_s"]
    assert min(found["one_thread_cpu_s"], found["two_threads_cpu_s"]) > 0
