"""The disk full before, in and after training, and files that are damaged on it."""

import os
import subprocess
import time

import pytest

from ppal_backend.errors import StoreUnavailable
from ppal_backend.operations.control import roll_back
from tests.place import Place
from tests.rounds.fakes import FakeWorld
from tests.rounds.test_folder import flip_a_byte

pytestmark = pytest.mark.faults


@pytest.fixture
def place(place):
    place.round("rank")
    return place


def waiting(place, words):
    record = place.store.rounds.request(1, "train", "x")
    queue = place.label_studio.served()
    place.run()
    record = place.store.rounds.get(record.id)
    assert record.state == "running" and record.crashes == 0 and words in record.error
    assert words in place.store.projects.get(1).problems["disk"]
    assert place.label_studio.served() == queue, "annotators go on in the old queue"
    return record


def goes_on(place, record, recovered):
    started = time.monotonic()
    place.store.rounds.release(record.id)  # the time to wait is over
    place.run()
    recovered(time.monotonic() - started)
    assert place.store.rounds.get(record.id).state == "done"
    assert "disk" not in place.store.projects.get(1).problems
    assert place.world.calls.count("evaluate") == 1 and len(place.label_studio.served()) == 30


def test_too_little_space_before_a_step(place, recovered):
    enough = place.settings
    place.settings = enough.model_copy(update={"min_free_gib": 1e9})
    record = waiting(place, "expected at least 1e+09 GiB free")
    place.settings = enough
    goes_on(place, record, recovered)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file data/9"),
])  # fmt: skip
def test_disk_full_in_training(place, error, recovered):
    class Full(FakeWorld):
        def train(self, *arguments):
            raise error

    world, place.world = place.world, Full()
    record = waiting(place, "the disk was full in step 'train'")
    place.world = world
    exports = world.calls.count("export")
    goes_on(place, record, recovered)
    assert world.calls.count("export") == exports, "what was done before is not done again"


def test_disk_full_in_publishing(place, monkeypatch, recovered):
    from ppal_backend.rounds.folder import RoundFolder

    write = RoundFolder.write

    def full(self, name, value):
        if name == "publish.json":
            raise OSError(28, "No space left on device")
        write(self, name, value)

    monkeypatch.setattr(RoundFolder, "write", full)
    record = waiting(place, "the disk was full in step 'publish'")
    monkeypatch.setattr(RoundFolder, "write", write)
    goes_on(place, record, recovered)


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own can only be mounted by root")
def test_a_disk_that_is_really_full_state_database_and_all(tmp_path, recovered):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "ppal-test", disk], check=False)
    if mounted.returncode:
        pytest.skip("this system does not let root mount a disk")

    class Large(FakeWorld):
        def train(self, spec, labels, files, folder, on_progress, should_stop):
            trained = super().train(spec, labels, files, folder, on_progress, should_stop)
            (folder / "model.pth").write_bytes(b"w" * 4_000_000)
            return trained

    place = Place(disk)
    try:
        place.world = Large()
        record = place.store.rounds.request(1, "train", "x")
        try:
            place.run()
        except StoreUnavailable as error:
            assert "full" in str(error)
        assert place.store.rounds.get(record.id).state == "running" and place.label_studio.served() == []
        subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
        goes_on(place, record, recovered)
        assert (place.folder(1) / "train" / "model.pth").stat().st_size == 4_000_000
    finally:
        place.store.close()
        subprocess.run(["umount", disk], check=True)


def test_a_corrupt_checkpoint_is_never_ranked_with(place, recovered):
    place.round()
    place.round()
    queue = place.label_studio.served()
    flip_a_byte(place.folder(3) / "train" / "model.pth")
    record = place.round("rank")
    assert record.state == "failed" and "the file is damaged; train again" in record.error
    assert place.label_studio.served() == queue
    started = time.monotonic()
    roll_back(place.settings, place.store, place.client, 1, place.versions()[1])
    assert place.round("rank").state == "done"
    recovered(time.monotonic() - started)


def test_a_corrupt_artifact_is_done_again_when_the_round_goes_on(place, recovered):
    record = place.store.rounds.request(1, "train", "x")
    place.world.kill_in = "evaluate"
    with pytest.raises(BaseException, match="evaluate"):
        place.run()
    flip_a_byte(place.folder(2) / "train" / "model.pth")
    started = time.monotonic()
    place.store.rounds.release(record.id)
    place.run()
    recovered(time.monotonic() - started)
    assert place.store.rounds.get(record.id).state == "done" and place.world.calls.count("train") == 2
    assert (place.folder(2) / "train" / "model.pth").read_bytes() == b"weights of round 2"
