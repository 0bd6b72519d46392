"""Retention: what goes, and above all what never goes."""

import json
import os
import time
from dataclasses import replace

import pytest

from ppal_backend.datasets.images import Evicted
from ppal_backend.errors import DetectorError, RoundCancelled
from ppal_backend.operations.control import roll_back
from ppal_backend.operations.pruning import prune_images, prune_project
from ppal_backend.store import Lease


def whole(place):
    """Rounds whose files are all there."""
    names = ("detections", "dataset", "export", "train")
    folders = (place.folder(r.number) for r in place.store.rounds.of_project(1))
    return [int(f.name) for f in folders if any((f / n).exists() for n in names)]


@pytest.fixture
def place(make_place):
    return make_place(keep_artifacts=2)


def test_every_round_prunes_and_the_last_versions_stay(place):
    for _ in range(4):
        place.round()
    assert whole(place) == [3, 4]
    old = place.folder(1)
    assert sorted(p.name for p in old.iterdir()) == [
        "map.json", "metrics.json", "publish.json", "query_set.json", "round.json", "spec.json", "steps"]  # fmt: skip
    assert (place.folder(3) / "detections").is_dir() and (place.folder(3) / "train" / "model.pth").is_file()


def test_the_active_version_stays_however_old_it_is(make_place):
    place = make_place(keep_artifacts=5)
    place.round("rank")
    place.round()
    place.round()
    roll_back(place.settings, place.store, place.client, 1, place.versions()[0])
    settings = place.settings.model_copy(update={"keep_artifacts": 1})
    assert [p.round_number for p in prune_project(settings, place.store, 1)] == [2]
    assert whole(place) == [1, 3]


def test_the_model_behind_rankings_stays_while_they_rank_with_it(place):
    place.round()
    for _ in range(4):
        place.round("rank")
    assert (place.folder(1) / "train" / "model.pth").is_file(), "the active version ranks with it"
    assert not (place.folder(1) / "detections").exists() and not (place.folder(2) / "detections").exists()
    place.round()
    place.round()
    assert not (place.folder(1) / "train").exists()


def test_what_an_open_round_needs_stays(place):
    place.round()
    place.store.rounds.request(1, "rank", "x")
    place.world.kill_in = "infer"
    with pytest.raises(BaseException, match="infer"):
        place.run()
    record = place.store.rounds.running(1)
    for number in range(3, 6):  # meanwhile other versions come, as after a restore or by another worker
        version = place.store.versions.active(1)
        name = f"ppal-r{number}-x"
        place.store.versions.activate(replace(version, version=name, round_number=number, checkpoint=""))
    prune_project(place.settings, place.store, 1)
    assert (place.folder(1) / "train" / "model.pth").is_file() and (place.folder(2) / "dataset").is_dir()
    place.store.rounds.release(record.id)
    place.run()
    assert place.store.rounds.get(record.id).state == "done"
    assert not place.store.rounds.claim(1, Lease.mine())


@pytest.mark.parametrize("how", ["failed", "cancelled"])
@pytest.mark.parametrize("rounds_before", [0, 1])
def test_a_round_that_ended_early_keeps_its_log_and_nothing_that_it_would_go_on_with(
    place, how, rounds_before, monkeypatch
):
    for _ in range(rounds_before):
        place.round()
    before = whole(place)
    train = place.world.train

    def ending(spec, labels, files, folder, *rest):
        train(spec, labels, files, folder, *rest)
        (folder / "images").mkdir()
        (folder / "images" / "1.bmp").write_bytes(bytes(1000))
        (folder / "iter_50.pth").write_bytes(bytes(1000))
        (folder / "train.log").write_text("loss nan")
        if how == "failed":
            raise DetectorError("the training diverged")
        place.store.rounds.ask_cancel(place.store.rounds.running(1).id)
        raise RoundCancelled("stopped")

    monkeypatch.setattr(place.world, "train", ending)
    record = place.round()
    assert record.state == how
    folder = place.folder(record.number) / "train"
    assert (folder / "train.log").is_file() and not list(folder.glob("*.pth")) and not (folder / "images").exists()
    assert (place.folder(record.number) / "dataset").is_dir()
    assert [number for number in whole(place) if number != record.number] == before, "the version in force stays"


def test_what_was_moved_away_goes_after_as_many_versions_as_are_kept(place):
    """Rounds of a state that is gone, and the folder of an earlier project with this id: nothing removed them."""
    place.round()
    folder, moved_at = place.folder(1), int(time.time())
    lost = folder.with_name(f"7.replaced-{moved_at}")
    earlier = folder.parent.parent.with_name(f"1.replaced-{moved_at}")
    for path, size in ((lost / "train" / "model.pth", 3000), (earlier / "rounds" / "1" / "metrics.json", 500)):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    time.sleep(1.1)
    place.round()
    assert prune_project(place.settings, place.store, 1, dry_run=True) == [] and lost.is_dir(), "one version since"
    keeps_more = place.settings.model_copy(update={"keep_artifacts": 5})
    place.store.versions.activate(replace(place.store.versions.active(1), version="another"))
    assert prune_project(keeps_more, place.store, 1) == [] and lost.is_dir()
    told = prune_project(place.settings, place.store, 1, dry_run=True)
    moved = [(p.round_number, p.size_bytes) for p in told if p.is_replaced]
    assert moved == [(7, 3000), (None, 500)]
    assert lost.is_dir() and prune_project(place.settings, place.store, 1) == told
    assert not lost.exists() and not earlier.exists() and place.folder(2).is_dir()


def test_a_dry_run_tells_and_removes_nothing(make_place):
    place = make_place(keep_artifacts=5)
    for _ in range(3):
        place.round()
    settings = place.settings.model_copy(update={"keep_artifacts": 1})
    told = prune_project(settings, place.store, 1, dry_run=True)
    assert [p.round_number for p in told] == [1, 2] and whole(place) == [1, 2, 3]
    on_disk = sum(f.stat().st_size for f in place.folder(1).rglob("*") if f.is_file())
    assert prune_project(settings, place.store, 1) == told and whole(place) == [3]
    left = sum(f.stat().st_size for f in place.folder(1).rglob("*") if f.is_file())
    assert on_disk - left == told[0].size_bytes > 0
    assert prune_project(settings, place.store, 1) == []


@pytest.fixture
def fetched(place):
    """Six images of 1,000 bytes that were fetched an hour or more ago, the first one longest ago."""
    long_ago = time.time() - 10_000
    folder = place.settings.model_dir / "images" / "ab"
    folder.mkdir(parents=True)
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(bytes(1000))
        (folder / f"{i}.json").write_text("{}")
        os.utime(folder / f"{i}.json", (long_ago + i, long_ago + i))
    return lambda: sorted(path.stem for path in folder.glob("*.jpg"))


def limited(place, count):
    return place.settings.model_copy(update={"image_cache_gib": count * 1002 / 2**30})


def test_images_beyond_the_limit_go_and_those_used_last_stay(place, fetched):
    settings = limited(place, 4)
    assert prune_images(settings, place.store, dry_run=True).images == 2 and len(fetched()) == 6
    assert prune_images(settings, place.store) == Evicted(2, 2004, 4008)
    assert fetched() == ["2", "3", "4", "5"]
    assert prune_images(settings, place.store).images == 0


def test_images_of_open_rounds_and_active_versions_stay_whatever_the_limit(place, fetched):
    place.round()
    folder = place.settings.model_dir.resolve() / "images" / "ab"
    pool = [{"image_id": 7, "path": str(folder / "1.jpg"), "width": 1, "height": 1}]
    (place.folder(1) / "dataset" / "pool.json").write_text(json.dumps(pool))
    place.store.rounds.request(1, "rank", "open")
    (place.folder(2) / "dataset").mkdir(parents=True)
    (place.folder(2) / "dataset" / "pool.json").write_text(json.dumps([{**pool[0], "path": str(folder / "3.jpg")}]))
    prune_images(limited(place, 0), place.store)
    assert fetched() == ["1", "3"]


def test_images_that_a_data_set_in_the_making_may_need_stay(place, fetched):
    now = time.time()
    os.utime(place.settings.model_dir / "images" / "ab" / "0.json", (now, now))
    prune_images(limited(place, 0), place.store)
    assert fetched() == ["0"]
