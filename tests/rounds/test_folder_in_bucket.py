"""Rounds that go on on another machine: what is in the bucket is taken up, and nothing else is believed."""

import json
import shutil
import uuid

import pytest

from ppal_backend.errors import ArtifactsUnavailable, DamagedArtifact
from ppal_backend.rounds.bucket import Bucket
from ppal_backend.rounds.folder import IDENTITY, OUTPUTS, RoundFolder, Rounds
from ppal_backend.rounds.ports import Ports
from ppal_backend.rounds.run import TRAIN_STEPS, run_round
from ppal_backend.settings import load_settings
from tests.rounds.fakes import SPEC, FakeWorld, Killed
from tests.rounds.test_folder import flip_a_byte

KEY = "1.1795336563"
THIS, LOST = "1.2026-11-02T08:00:00.000001", "1.2026-10-01T08:00:00.000001"
"""Two rounds that had the same number and the same row, the second one in a database that is gone."""
WORK = ["export", "prepare", "train", "evaluate", "infer", "publish"]


class Machines:
    """Machines with a data folder each, and one bucket."""

    def __init__(self, folder):
        self.folder = folder
        self.bucket = Bucket(f"memory://{uuid.uuid4().hex}", lambda _: None)

    def rounds(self, name):
        return Rounds(load_settings(MODEL_DIR=self.folder / name), self.bucket)

    def path(self, name):
        return self.folder / name / "projects" / "1" / "rounds" / "1"

    def run(self, name, world, first=False, identity=THIS):
        folder = self.rounds(name).open(KEY, 1, 1, identity, first)
        return run_round(SPEC, folder, Ports(world, world, world, world))

    def killed(self, name, call):
        world = FakeWorld()
        world.kill_in = call
        with pytest.raises(Killed):
            self.run(name, world)
        return world

    def lose(self, name):
        shutil.rmtree(self.folder / name)

    def replaced(self, name):
        return list(self.path(name).parent.glob("1.replaced-*"))

    def forget_identity(self, name):
        """As an earlier release left the round."""
        (self.path(name) / IDENTITY).unlink()
        self.bucket.delete([f"projects/{KEY}/rounds/1/{IDENTITY}"])

    def there(self):
        return [name.split("/rounds/1/")[1] for name in self.bucket.names("projects")]


def work(world):
    return [call for call in world.calls if not call.startswith("progress")]


@pytest.fixture
def machines(tmp_path):
    return Machines(tmp_path)


@pytest.fixture
def undisturbed(tmp_path):
    world = FakeWorld()
    return run_round(SPEC, RoundFolder(tmp_path / "alone"), Ports(world, world, world, world)).queue


def test_everything_a_round_leaves_is_in_the_bucket(machines):
    machines.run("a", FakeWorld(), first=True)
    here = machines.path("a")
    files = sorted(str(p.relative_to(here)) for p in here.rglob("*") if p.is_file())
    assert machines.there() == files and "train/model.pth" in files
    for name in files:
        assert machines.bucket.read(f"projects/{KEY}/rounds/1/{name}") == (here / name).read_bytes()


@pytest.mark.parametrize("call", WORK)
def test_a_round_goes_on_on_another_machine_from_its_last_finished_step(machines, undisturbed, call):
    machines.killed("a", call)
    machines.lose("a")
    world = FakeWorld()
    assert machines.run("b", world).queue == undisturbed
    done = WORK[: WORK.index(call)]
    needs_images = call in ("train", "evaluate", "infer")  # the images are on the other machine, they are fetched again
    expected = [c for c in WORK if c not in done or (c == "prepare" and needs_images)]
    assert work(world) == expected
    assert world.published[0][0].checkpoint == str(machines.path("b") / "train" / "model.pth")


def test_what_publishing_has_come_to_reaches_the_other_machine(machines):
    machines.killed("a", "publish")
    machines.lose("a")
    world = FakeWorld()
    machines.run("b", world)
    assert world.states == [{"version": "ppal-r1-x", "state": "importing"}]


def test_images_that_are_here_are_not_fetched_again(machines, monkeypatch):
    machines.killed("a", "train")
    machines.lose("a")
    monkeypatch.setattr("ppal_backend.rounds.folder._has_images", lambda folder: True)
    world = FakeWorld()
    machines.run("b", world)
    assert "prepare" not in work(world)


def test_an_upload_that_fails_midway_leaves_no_mark_and_is_made_up_for(machines, monkeypatch):
    upload, broken = machines.bucket.upload, []

    def breaks(source, name):
        if name.endswith("model.json") and not broken:
            broken.append(name)
            raise ArtifactsUnavailable("expected the bucket to take it, got nothing")
        upload(source, name)

    monkeypatch.setattr(machines.bucket, "upload", breaks)
    world = FakeWorld()
    with pytest.raises(ArtifactsUnavailable, match="expected the bucket to take it"):
        machines.run("a", world)
    assert "steps/train.json" not in machines.there() and "steps/dataset.json" in machines.there()
    again = FakeWorld()
    machines.run("a", again)
    assert work(again) == ["evaluate", "infer", "publish"], "the training was done, and only not copied"
    assert "steps/train.json" in machines.there() and "train/model.json" in machines.there()


@pytest.mark.parametrize("step", ["export", "train", "infer", "query"])
def test_a_damaged_copy_is_given_up_with_what_came_of_it(machines, undisturbed, step, caplog):
    machines.killed("a", "publish")
    machines.lose("a")
    (victim,) = [n for n in machines.bucket.names("projects") if n.split("/rounds/1/")[1] in DAMAGED[step]]
    machines.bucket.write(victim, b"something else")
    world = FakeWorld()
    assert machines.run("b", world).queue == undisturbed
    images = ("dataset",) if step in ("train", "infer") else ()  # they were on the other machine
    assert tuple(world.steps) == images + TRAIN_STEPS[TRAIN_STEPS.index(step) :]
    assert f"done again from step '{step}'" in caplog.text
    machines.lose("b")
    world = FakeWorld()
    machines.run("c", world)
    assert world.steps == [], "the bucket holds it all again"


DAMAGED = {
    "export": ["export/annotated.json"],
    "train": ["train/model.pth"],
    "infer": ["detections/shard-00000.npz"],
    "query": ["query_set.json"],
}


def test_a_damaged_file_here_is_fetched_instead_of_trained_again(machines):
    machines.killed("a", "publish")
    flip_a_byte(machines.path("a") / "train" / "model.pth")
    world = FakeWorld()
    machines.run("a", world)
    assert work(world) == ["publish"]


def test_a_machine_that_comes_back_goes_by_what_others_have_done_since(machines, undisturbed, monkeypatch):
    def no_bucket(*_):
        raise ArtifactsUnavailable("the network is away here")

    first = FakeWorld()
    with monkeypatch.context() as patch:  # trained, but nobody heard of it
        patch.setattr(machines.bucket, "upload", lambda s, n: no_bucket() if "/train/" in n else upload(s, n))
        upload = Bucket.upload.__get__(machines.bucket)
        with pytest.raises(ArtifactsUnavailable):
            machines.run("a", first)
    stale = machines.path("a")
    (stale / "detections").mkdir()
    (stale / "detections" / "shard-00007.npz").write_bytes(b"of a model that is none any more")
    other = FakeWorld()
    other.kill_in = "infer"
    other.labelled = 20
    other.trained_weights = b"weights of the other machine"
    with pytest.raises(Killed):
        machines.run("b", other)
    machines.lose("b")
    world = FakeWorld()
    assert machines.run("a", world).queue == undisturbed
    assert (stale / "train" / "model.pth").read_bytes() == b"weights of the other machine"
    assert [step for step in work(world) if step != "prepare"] == ["infer", "publish"], "it trained again"
    assert not (stale / "detections" / "shard-00007.npz").exists()


def test_a_copy_under_the_number_of_a_new_round_is_deleted(machines, caplog):
    machines.run("old", FakeWorld(), first=True, identity=LOST)
    machines.lose("old")
    world = FakeWorld()
    machines.run("new", world, first=True)
    assert work(world) == WORK and "earlier installation" in caplog.text


@pytest.mark.parametrize("first", [True, False])
def test_a_folder_under_the_number_of_a_new_round_goes_with_its_copy_and_is_not_lost(machines, first):
    """``first=False``: an earlier attempt was killed before it opened the folder."""
    machines.run("a", FakeWorld(), first=True, identity=LOST)
    (machines.path("a") / "metrics.json").write_text("{}")
    world = FakeWorld()
    machines.run("a", world, first=first)
    assert work(world) == WORK, "the local folder was kept with all its marks"
    (replaced,) = machines.replaced("a")
    assert (replaced / "metrics.json").read_text() == "{}" and (replaced / "steps" / "publish.json").is_file()
    here = machines.path("a")
    assert machines.there() == sorted(str(p.relative_to(here)) for p in here.rglob("*") if p.is_file())
    machines.lose("a")
    again = FakeWorld()
    machines.run("b", again)
    assert again.steps == [], "the copy is the new round's, whole"


def test_a_machine_that_still_has_the_lost_round_goes_on_with_the_copy_of_the_new_one(machines):
    machines.run("a", FakeWorld(), first=True, identity=LOST)
    world = FakeWorld()
    world.kill_in = "infer"
    with pytest.raises(Killed):
        machines.run("b", world, first=True)
    world = FakeWorld()
    machines.run("a", world)
    assert [call for call in work(world) if call != "prepare"] == ["infer", "publish"]
    assert len(machines.replaced("a")) == 1


def test_what_was_fetched_of_the_lost_round_to_be_read_is_not_taken_for_the_new_one(machines):
    machines.run("a", FakeWorld(), first=True, identity=LOST)
    machines.rounds("service").fetch(KEY, 1, 1, list(OUTPUTS))
    world = FakeWorld()
    machines.run("service", world)
    assert work(world) == WORK and len(machines.replaced("service")) == 1


@pytest.mark.parametrize("machine", ["a", "b"])
def test_an_unfinished_round_of_an_earlier_release_goes_on(machines, undisturbed, machine):
    machines.killed("a", "publish")
    machines.forget_identity("a")
    world = FakeWorld()
    assert machines.run(machine, world).queue == undisturbed
    assert work(world) == ["publish"] and not machines.replaced(machine)
    assert IDENTITY in machines.there() and (machines.path(machine) / IDENTITY).is_file()


def test_what_an_earlier_release_left_under_the_number_of_a_new_round_is_replaced(machines):
    machines.run("a", FakeWorld(), first=True, identity=LOST)
    machines.forget_identity("a")
    world = FakeWorld()
    machines.run("a", world, first=True)
    assert work(world) == WORK and len(machines.replaced("a")) == 1


def test_a_round_whose_identity_cannot_be_read_goes_on(machines):
    machines.killed("a", "publish")
    (machines.path("a") / IDENTITY).write_text("{")
    machines.bucket.write(f"projects/{KEY}/rounds/1/{IDENTITY}", b"\xff[]")
    world = FakeWorld()
    machines.run("a", world)
    assert work(world) == ["publish"] and not machines.replaced("a")
    assert json.loads(machines.bucket.read(f"projects/{KEY}/rounds/1/{IDENTITY}")) == {"identity": THIS}


def test_projects_with_the_same_id_are_kept_apart(machines):
    machines.run("a", FakeWorld(), first=True)
    machines.rounds("b").fetch("1.999", 1, 1, list(OUTPUTS))
    assert not (machines.folder / "b").exists()


def test_a_service_fetches_the_checkpoint_that_it_lacks(machines):
    machines.run("a", FakeWorld(), first=True)
    machines.lose("a")
    rounds = machines.rounds("service")
    rounds.fetch_checkpoint(KEY, "projects/1/rounds/1/train/model.pth")
    folder = machines.folder / "service" / "projects/1/rounds/1"
    assert (folder / "train" / "model.pth").read_bytes() == b"weights of round 1"
    assert not (folder / "detections").exists(), "nothing else is fetched"
    machines.bucket.delete(machines.bucket.names("projects"))
    rounds.fetch_checkpoint(KEY, "projects/1/rounds/1/train/model.pth")


def test_a_service_that_fetches_a_damaged_checkpoint_says_so(machines):
    machines.run("a", FakeWorld(), first=True)
    machines.bucket.write(f"projects/{KEY}/rounds/1/train/model.pth", b"something else")
    with pytest.raises(DamagedArtifact, match="damaged; train again"):
        machines.rounds("service").fetch_checkpoint(KEY, "projects/1/rounds/1/train/model.pth")
    assert not (machines.folder / "service/projects/1/rounds/1/train/model.pth").exists()


def test_a_page_s_files_come_without_the_heavy_ones(machines):
    machines.killed("a", "publish")
    machines.lose("a")
    machines.rounds("service").show(KEY, 1, 1)
    folder = machines.folder / "service" / "projects/1/rounds/1"
    shown = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    marks = sorted(f"steps/{step}.json" for step in TRAIN_STEPS[:-1])
    small = ["metrics.json", "query_set.json", "dataset/pool.json", "dataset/quality.json", IDENTITY]
    assert shown == sorted([*marks, *small])
    assert json.loads((folder / "metrics.json").read_text())["map"] == 0.5
    world = FakeWorld()
    assert machines.run("service", world) and work(world) == ["publish"], "a worker there takes the round up as a whole"


def test_a_page_is_shown_without_the_bucket(machines, monkeypatch, caplog):
    def away(*_):
        raise ArtifactsUnavailable("the bucket is away")

    monkeypatch.setattr(machines.bucket, "names", away)
    machines.rounds("service").show(KEY, 1, 1)
    assert "cannot be shown as a whole: the bucket is away" in caplog.text


def test_marks_that_name_files_elsewhere_are_refused(machines):
    for name in ("../../../escaped", "/etc/passwd"):
        mark = json.dumps({"sha256": {name: "0" * 64}, "seconds": 1, "facts": {}}).encode()
        machines.bucket.write(f"projects/{KEY}/rounds/1/steps/train.json", mark)
        with pytest.raises(DamagedArtifact, match="names of files within the round"):
            machines.rounds("a").fetch(KEY, 1, 1, ("train",))


def test_old_rounds_lose_their_heavy_copies_but_not_what_others_need(machines):
    for number in (1, 2, 3, 4):
        folder = machines.rounds("a").open(KEY, 1, number, THIS, first_attempt=True)
        for name in ("train/model.pth", "detections/shard-00000.npz", "metrics.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        for step in ("train", "infer", "evaluate"):
            folder.mark_done(step, 1.0, {})
    gone = machines.rounds("elsewhere").prune_copies(KEY, {2}, 4, {"1/train/model.pth"})
    left = [name.split("/rounds/")[1] for name in machines.bucket.names("projects")]
    assert gone == [1, 3]
    assert [name for name in left if "steps" not in name] == [
        "1/metrics.json", "1/round.json", "1/train/model.pth",
        "2/detections/shard-00000.npz", "2/metrics.json", "2/round.json", "2/train/model.pth",
        "3/metrics.json", "3/round.json",
        "4/detections/shard-00000.npz", "4/metrics.json", "4/round.json", "4/train/model.pth",
    ]  # fmt: skip
    assert sum("/steps/" in name for name in left) == 12
