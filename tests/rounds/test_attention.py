"""A detector without time for the whole pool: which images it looks at first, and where the others stay."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ppal_backend.errors import SettingsError
from ppal_backend.rounds import run as run_module
from ppal_backend.rounds.attention import TURN, LastRound, keep_places, last_round, order_of_looking
from ppal_backend.rounds.detections_store import DetectionsWriter, StoredDetections
from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.rounds.ports import PoolEntry
from ppal_backend.settings import load_settings
from ppal_backend.structures.detections import Detections
from tests.rounds.fakes import SPEC, FakeWorld, Killed
from tests.rounds.test_reuse import World


def entries(ids):
    return [PoolEntry(i, f"/{i}.jpg", 10, 10) for i in ids]


def looked_at(order):
    return [entry.image_id for entry in order]


@pytest.fixture
def clock(monkeypatch):
    """Every image takes a minute."""
    minutes = itertools.count()
    monkeypatch.setattr(run_module.time, "monotonic", lambda: 60.0 * next(minutes))


def test_all_sources_take_turns_and_everything_comes_once(tmp_path):
    writer = DetectionsWriter(tmp_path)
    for i in range(100):
        writer.add(Detections.empty(i), {"global": np.array([np.cos(i / 50), np.sin(i / 50)], np.float32)})
    writer.flush()
    last = LastRound(list(range(100)), {i: float(i % 37) for i in range(100)}, StoredDetections(tmp_path))
    pool = [i for i in range(120) if i not in (50, 51)]
    order = looked_at(order_of_looking(entries(pool), {50, 51, 7777}, last, seed=3))
    assert sorted(order) == pool
    first = dict(zip(TURN, order[: len(TURN)], strict=False))
    assert order[0] == 36 and order[2] == 73 and order[5] == 35, "the highest utilities, ties to the lowest id"
    assert (order[1], order[4]) == (100, 101), "new ones"
    assert {order[3], order[6]} == {49, 52}, "those most like 50 and 51, which were labelled"
    assert first["random"] in pool


def test_a_random_share_reaches_what_nobody_would_look_at():
    last = LastRound(list(range(1000)), {i: 1000.0 - i for i in range(1000)})
    order = looked_at(order_of_looking(entries(range(1000)), (), last, seed=0))
    early = [i for i in order[:200] if i >= 500]
    assert 10 <= len(early) <= 60
    assert order != looked_at(order_of_looking(entries(range(1000)), (), last, seed=1))
    assert order == looked_at(order_of_looking(entries(range(1000)), (), last, seed=0))


def test_without_an_earlier_round_everything_is_new():
    assert sorted(looked_at(order_of_looking(entries(range(9)), (), LastRound(), 0))) == list(range(9))
    assert order_of_looking([], (), LastRound(), 0) == []


def test_older_images_keep_their_place_behind_the_query_set():
    #                     0  1  2  3  4  5  6  7  8; 9 has left the pool since
    last = [3, 9, 1, 7, 5, 4, 2, 8, 6, 0]
    found = keep_places([8, 2, 0, 6, 5], [1, 3, 4, 7], last, first=2)
    assert found[:2] == [8, 2], "the query set stays in front"
    assert found == [8, 2, 3, 1, 7, 4, 0, 6, 5]


def test_places_are_exactly_kept_where_nothing_else_moves():
    last = list(range(20))
    older = [4, 7, 12, 19]
    ranked = [i for i in last if i not in older]
    assert keep_places(ranked, older, last, first=3) == last
    assert keep_places(ranked, older, [], first=3) == ranked + older
    assert keep_places([], [2, 1], [1, 2], first=0) == [1, 2]


def test_a_round_looks_as_long_as_it_may_and_the_rest_keeps_its_place(tmp_path, clock):
    world = FakeWorld(pool=40)
    world.run(tmp_path / "1")
    before = RoundFolder(tmp_path / "1").read("query_set.json")
    result = world.run(tmp_path / "2", replace(SPEC, number=2, pool_minutes=12.0))
    facts = RoundFolder(tmp_path / "2").facts("infer")
    assert facts["images"] + facts["not_looked_at"] == 40 and facts["unreadable_images"] == 0
    assert 5 <= facts["looked_at"] == facts["images"] <= 12
    stored = RoundFolder(tmp_path / "2").read("query_set.json")
    assert sorted(result.queue) == list(range(1000, 1040)), "every task is published"
    assert len(stored["older"]) == facts["not_looked_at"]
    assert set(stored["older"]).isdisjoint(i for i, _ in stored["utilities"])
    assert set(result.queue[:5]).isdisjoint(stored["older"]), "the query set is of what was looked at"
    places = [before["queue"].index(i) for i in result.queue if i in stored["older"]]
    assert places == sorted(places)
    best = [i for i, _ in sorted(before["utilities"], key=lambda pair: (-pair[1], pair[0]))][:3]
    assert set(best) <= {i for i, _ in stored["utilities"]}, "the most uncertain of the last round were looked at"


def test_without_the_option_nothing_changes(tmp_path, clock):
    world = FakeWorld(pool=40)
    world.run(tmp_path / "1")
    world.run(tmp_path / "2", replace(SPEC, number=2))
    facts, stored = RoundFolder(tmp_path / "2").facts("infer"), RoundFolder(tmp_path / "2").read("query_set.json")
    assert (facts["images"], facts["not_looked_at"], stored["older"]) == (40, 0, [])
    assert not (tmp_path / "2" / "detections" / "spent.json").exists()


def test_a_killed_round_goes_on_with_the_minutes_that_are_left(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("ppal_backend.rounds.detections_store.DetectionsWriter.__init__.__defaults__", (2,))
    world = FakeWorld(pool=40)
    world.infer_limit = 6
    spec = replace(SPEC, pool_minutes=20.0)
    with pytest.raises(Killed):
        world.run(tmp_path / "1", spec)
    world.infer_limit = None
    world.run(tmp_path / "1", spec)
    facts = RoundFolder(tmp_path / "1").facts("infer")
    assert 6 < facts["images"] < 20 and facts["looked_at"] < 14, "not twenty minutes again"


def test_the_next_round_of_the_same_detector_goes_on_where_this_one_stopped(tmp_path, clock):
    world = World(tmp_path / "files", pool=40)
    world.rank(tmp_path, 1, pool_minutes=12.0)
    world.rank(tmp_path, 2, pool_minutes=12.0)
    first, second = (RoundFolder(tmp_path / str(n)).facts("infer") for n in (1, 2))
    assert second["images"] == first["looked_at"] + second["looked_at"] > first["images"]
    assert second["not_looked_at"] == 40 - second["images"]


def test_unreadable_images_are_not_taken_for_ones_left_out(tmp_path, clock, monkeypatch):
    plain = FakeWorld.infer

    def infer(self, spec, model, images, *rest):
        return plain(self, spec, model, [e for e in images if e.image_id % 3], *rest)

    monkeypatch.setattr(FakeWorld, "infer", infer)
    world = FakeWorld(pool=40)
    world.run(tmp_path / "1", replace(SPEC, pool_minutes=500.0))
    facts = RoundFolder(tmp_path / "1").facts("infer")
    assert (facts["not_looked_at"], facts["unreadable_images"]) == (0, sum(i % 3 == 0 for i in range(1000, 1040)))


def test_a_damaged_earlier_round_is_passed_over(tmp_path):
    world = FakeWorld()
    world.run(tmp_path / "1")
    world.run(tmp_path / "2", replace(SPEC, number=2))
    (tmp_path / "2" / "query_set.json").write_text("{")
    assert (
        list(last_round(RoundFolder(tmp_path / "3")).queue)
        == RoundFolder(tmp_path / "1").read("query_set.json")["queue"]
    )
    assert last_round(RoundFolder(tmp_path / "1")) == LastRound()


def test_minutes_are_an_option_of_projects_too(tmp_path):
    settings = load_settings(MODEL_DIR=tmp_path)
    assert settings.project_options().pool_minutes is None
    assert settings.project_options({"pool_minutes": 30}).pool_minutes == 30
    for wrong in (0, -1, float("inf")):
        with pytest.raises(SettingsError, match="pool_minutes"):
            settings.project_options({"pool_minutes": wrong})
