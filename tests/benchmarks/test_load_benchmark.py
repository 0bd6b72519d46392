"""The load benchmarks on a real Label Studio, small: they find what they sent, and count what is missing."""

import pytest

from benchmarks import large_project, load

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_webhooks_and_predictions_beside_a_training():
    report = load.run(seconds=2.0, rate_per_s=20.0, images=60, calls=1)
    webhooks = report["webhooks"]
    assert (webhooks["ms"]["count"], webhooks["refused"], webhooks["lost"], webhooks["twice"]) == (40, 0, 0, 0)
    assert webhooks["handled_s"] is not None
    assert [(p["training"], p["errors"], p["ms"]["count"]) for p in report["predictions"]] == [
        (False, 0, 8), (True, 0, 8)]  # fmt: skip


def test_a_large_project_made_small():
    report = large_project.run(tasks=120, publishing=50)
    large, publishing = report["large"], report["publishing"]
    assert large["tasks_ranked"] == 108 and list(large["published"].values()) == [108]
    assert set(large["seconds"]) == {"export", "dataset", "infer", "candidates", "query", "publish"}
    assert set(large["peak_gib"]) == set(large["seconds"]) and min(large["peak_gib"].values()) > 0.1
    assert len(publishing["bare_s"]) == len(publishing["publish_s"]) == large_project.TURNS
    assert min(publishing["bare_s"]) > 0 and publishing["ratio"] > 0
