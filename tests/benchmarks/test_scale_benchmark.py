"""The benchmark of growing pools runs a whole round, counts what was published, and reports the agreed keys."""

import json

import numpy as np
import pytest

from benchmarks import scale
from ppal_backend.rounds.pool_map import FEWEST_LABELLED

KEYS = {"round_gib_200000", "select_200000_s", "rank_100_new_s", "ccms_9460_gemm_share"}


def test_a_round_ranks_and_publishes_every_task_and_the_second_looks_at_new_ones_alone(tmp_path):
    first = scale.measure(300, tmp_path)
    assert (first["ranked"], first["published"], first["looked_at"]) == (300, 300, 300 + FEWEST_LABELLED)
    assert first["chosen"] == first["candidates"] == 300
    assert set(first["peak_gib"]) == set(first["cpu_s"]) == {*first["seconds"]}
    assert first["round_gib"] == max(g for s, g in first["peak_gib"].items() if s != "infer")
    again = scale.measure(350, tmp_path, number=2)
    assert (again["ranked"], again["published"]) == (350, 350) and again["looked_at"] == 50
    report = {**dict.fromkeys(KEYS), "table": [first], "again": again}
    assert "| 300 | 300 |" in scale.table(report) and "| 350 |" in scale.table(report)
    scale.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_report_has_every_key(monkeypatch):
    def figures(*arguments):
        size = int(arguments[1])
        return {"images": size, "round_gib": size / 1e6, "select_s": 5.0, "total_s": 9.0, "label_studio_s": 2.0}

    monkeypatch.setattr(scale, "in_fresh_process", figures)
    monkeypatch.setattr(scale, "acquisition_figures", lambda *_: {"gemm_share": 0.5})
    report = scale.run((20_000, 200_000))
    assert set(report) >= KEYS and json.dumps(report)
    assert {key: report[key] for key in KEYS} == {
        "round_gib_200000": 0.2, "select_200000_s": 5.0, "rank_100_new_s": 7.0, "ccms_9460_gemm_share": 0.5,
    }  # fmt: skip
    assert report["again"]["images"] == 20_100
    assert all(scale.run((20_000,), again_at=0)[key] is None for key in KEYS)


def test_made_up_images_are_like_those_of_the_other_benchmark():
    found = list(scale.MadeUp().of(range(200)))
    valid = [int((d.scores >= 0.05).sum()) for d in found]
    assert np.mean(valid) == pytest.approx(scale.VALID, abs=1) and {len(d) for d in found} == {scale.DETECTIONS}
    counts = np.bincount(np.concatenate([d.class_indices for d in found]), minlength=scale.CLASSES)
    share = counts[0] / counts.sum()
    assert share == pytest.approx(1 / sum(1 / n for n in range(1, scale.CLASSES + 1)), abs=0.02), "Zipf: a fifth"
    assert found[0].embeddings.shape == (100, 256)
    assert not np.array_equal(found[0].embeddings[0], found[1].embeddings[0])
