"""The operators' commands through the command line: what they say, and what they leave."""

import json

import pytest

from ppal_backend.settings import load_settings
from ppal_backend.store import Lease, ModelVersion, SeenAnnotation, open_store


@pytest.fixture
def store(store):
    store.projects.connect(7, "7.1", "<View/>", "http://ls", {})
    return store


def measured(value, images, **more):
    interval = [value - 0.1, value + 0.1] if images >= 10 else None
    told = {"map": value, "interval": interval, "classes": {"cat": value}, "too_few": {}, "images": images}
    return {"map": value, "measured": told, "image_set": "a", "images_wanted": 40, **more}


def test_versions_are_listed_with_what_can_be_gone_back_to(run, store):
    store.versions.activate(ModelVersion(7, "ppal-r1-a", 1, "tiny", "", ("a",), None, measured(0.25, 40)))
    store.versions.activate(ModelVersion(7, "ppal-r2-b", 2, "", "", (), None, {}))
    shown = json.loads(run("versions", 7, "--json").stdout)
    assert [(v["version"], v["active"], v["files"]) for v in shown] == [
        ("ppal-r1-a", False, False),
        ("ppal-r2-b", True, False),
    ]
    lines = run("versions", 7).stdout.splitlines()
    (first,) = [line for line in lines if "ppal-r1-a" in line]
    assert "0.250" in first and "removed" in first and "yes" not in first
    unknown = run("versions", 8)
    assert unknown.exit_code == 1 and "project 8 is not connected" in unknown.stderr


def test_rollback_without_a_token_says_what_is_missing(run, store):
    done = run("rollback", 7, "ppal-r1-a")
    assert done.exit_code == 1 and "LABEL_STUDIO_API_KEY" in done.stderr


def test_cancel_ends_what_is_open_and_its_annotations_do_not_ask_again(run, store):
    store.ledger.see(7, [SeenAnnotation(i, i) for i in range(5)])
    store.rounds.request(7, "train", "x")
    running = store.rounds.claim(7, Lease.mine())
    store.rounds.request(7, "train", "y")
    done = run("cancel", 7)
    assert done.exit_code == 0
    assert "round 1 is being stopped" in done.stdout and "round 2 is cancelled" in done.stdout
    assert store.rounds.get(running.id).cancel_asked and store.ledger.new_count(7) == 0
    store.rounds.cancel(running.id, "stopped")
    nothing = run("cancel", 7)
    assert nothing.exit_code == 1 and "no open round" in nothing.stderr


def test_cancelling_a_ranking_uses_up_no_annotations(run, store):
    store.ledger.see(7, [SeenAnnotation(1, 1)])
    store.rounds.request(7, "rank", "x")
    run("cancel", 7)
    assert store.ledger.new_count(7) == 1 and store.rounds.of_project(7)[0].state == "cancelled"


def test_pause_is_seen_and_taken_back(run, store):
    assert "now paused" in run("pause", 7).stdout and "already paused" in run("pause", 7).stdout
    assert store.projects.get(7).paused and "ppal resume 7" in run("status", 7).stdout
    assert "goes on" in run("resume", 7).stdout and "was not paused" in run("resume", 7).stdout
    assert not store.projects.get(7).paused and store.projects.get(7).problems == {}
    assert run("pause", 8).exit_code == 1


def test_backup_and_restore_go_through_the_command_line(run, store, tmp_path, monkeypatch):
    assert run("backup", tmp_path / "b.tar").exit_code == 0
    refused = run("restore", tmp_path / "b.tar")
    assert refused.exit_code == 1 and "--force" in refused.stderr
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "new"))
    assert "restored 1 files" in run("restore", tmp_path / "b.tar").stdout
    restored = open_store(load_settings(MODEL_DIR=tmp_path / "new"))
    assert restored.projects.get(7).key == "7.1"
    restored.close()


def test_status_says_how_good_the_last_version_is_and_whether_it_is_worse(run, store):
    worse = {"1": {"map": -0.1, "interval": [-0.15, -0.05]}}
    for number, metrics in ((1, measured(0.4, 4)), (2, measured(0.3, 40, active=1, differences=worse))):
        store.rounds.request(7, "train", "x")
        store.rounds.finish(store.rounds.claim(7, Lease.mine()).id, metrics)
        shown = " ".join(run("status", 7).stdout.split())
        if number == 1:
            assert "Measured on 4 images: too few to tell; 36 more come by themselves." in shown
            assert "0.400" not in shown
    assert "mAP 0.300 (0.200 to 0.400), measured on 40 images." in shown
    assert "Worse than round 1's on the same images: −0.100 (−0.150 to −0.050) mAP." in shown


def test_prune_tells_how_much(run, store):
    assert "would free 0.0 MiB" in run("prune", "--dry-run").stdout and "freed 0.0 MiB" in run("prune", 7).stdout


def test_prune_tells_what_was_moved_away(run, store):
    rounds = load_settings().project_folder(7) / "rounds"
    for name, size in (("3.replaced-1000", 3 * 2**20), ("../../7.replaced-2000/rounds/1", 2**20)):
        (rounds / name).mkdir(parents=True, exist_ok=True)
        (rounds / name / "model.pth").write_bytes(bytes(size))
    for number in range(load_settings().keep_artifacts):
        store.versions.activate(ModelVersion(7, f"ppal-r{number}", number, "", "", (), None, {}))
    shown = " ".join(run("prune", 7, "--dry-run").stdout.split())
    assert "project 7 round 3 (moved away: the state does not know it): 3.0 MiB" in shown
    assert "project 7 (moved away: the state does not know it): 1.0 MiB would free 4.0 MiB" in shown
    rows = json.loads(run("prune", 7, "--json").stdout)["rounds"]
    assert [(row["round"], row["replaced"]) for row in rows] == [(3, True), (None, True)]
    assert not list(rounds.glob("*.replaced-*")) and "freed 0.0 MiB" in run("prune", 7).stdout


def test_status_tells_what_the_last_training_decided_about_tiles(run, store):
    for number, reason in ((1, "boxes were large"), (2, "half of the 90 labelled boxes are under 20 px")):
        store.rounds.request(7, "train", "x")
        record = store.rounds.claim(7, Lease.mine())
        store.rounds.finish(record.id, {"map": 0.1, "slices": 416 if number == 2 else None, "why_slices": reason})
    shown = run("status", 7).stdout
    assert "in tiles of 416 px" in shown and "half of the 90 labelled boxes" in shown and "were large" not in shown
    (project,) = json.loads(run("status", 7, "--json").stdout)
    assert project["rounds"][1]["metrics"]["slices"] == 416


def test_pin_steers_the_queue_and_lists_what_is_asked_of_it(run, store):
    store.projects.set_label_config(
        7,
        '<View><Image name="i" value="$image"/><RectangleLabels name="l" toName="i"><Label value="cat"/>'
        "</RectangleLabels></View>",
    )
    assert "nothing is asked of the queue" in run("pin", 7).stdout and store.rounds.of_project(7) == []
    told = run("pin", 7, "--next", 12, "--next", 9, "--last", 30, "--quota", "30% label:cat").stdout
    assert "Tasks 12, 9 in front of the queue; round 1 puts the queue in its new order." in told
    assert "next: 12, 9" in told and "last: 30" in told and "quota 1: at least 30 % with cat" in told
    shown = json.loads(run("pin", 7, "--remove", 9, "--remove-quota", 1, "--json").stdout)
    assert (shown["first"], shown["last"], shown["quotas"]) == ([12], [30], []) and len(shown["done"]) == 2
    refused = run("pin", 7, "--quota", "30% label:dog")
    assert refused.exit_code == 1 and "a label of the project (cat), got 'dog'" in refused.stderr
    assert run("pin", 8).exit_code == 1
