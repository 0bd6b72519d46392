"""Workers and a service that share a database and a bucket, and no disk."""

import json
import re
import shutil
import time

import pytest
from fsspec.implementations.local import LocalFileSystem

from ppal_backend.detector.infer.exporting_model import Exported
from ppal_backend.errors import ArtifactsUnavailable, SettingsError, StoreUnavailable
from ppal_backend.operations.control import roll_back
from ppal_backend.operations.pruning import prune_project
from ppal_backend.rounds.bucket import Bucket
from ppal_backend.rounds.folder import Rounds
from ppal_backend.service.app import create_app
from ppal_backend.settings import load_settings
from ppal_backend.store import open_store
from ppal_backend.worker.round_process import run_next_round
from ppal_backend.worker.worker import run_worker
from tests.place import Place
from tests.rounds.fakes import FakeWorld, Killed
from tests.service.conftest import CONFIG, FakeImages, FakePredictor, RecordingJobs
from tests.worker.test_round_process import only

KEY = "1.1795336563"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """``machine(name)``: the settings of one."""

    def settings(name, **changes):
        return load_settings(
            MODEL_DIR=tmp_path / name,
            database_url=f"sqlite:///{tmp_path}/state/ppal.db",
            artifacts=f"file://{tmp_path}/bucket",
            START_TRAINING_EACH_N_UPDATES=5,
            **changes,
        )

    return settings


@pytest.fixture
def settings(machine):
    return machine("a")


@pytest.fixture
def store(store):
    store.projects.connect(1, KEY, "<View/>", "http://ls", {"delta": 2.0})
    return store


def killed(settings, call):
    world = FakeWorld()
    world.kill_in = call
    with pytest.raises(Killed):
        run_next_round(settings, 1, world.ports)


def test_a_round_begun_on_one_machine_is_completed_on_another(machine, store, tmp_path):
    store.rounds.request(1, "train", "x")
    killed(machine("a"), "infer")
    shutil.rmtree(tmp_path / "a")
    store.rounds.release(only(store).id)  # what the lease does once it has run out
    world = FakeWorld()
    assert run_next_round(machine("b"), 1, world.ports)
    assert only(store).state == "done" and "train" not in world.calls
    version = store.versions.active(1)
    assert version.checkpoint == "projects/1/rounds/1/train/model.pth"
    assert (tmp_path / "b" / version.checkpoint).read_bytes() == b"weights of round 1"


def test_a_ranking_finds_its_model_on_whichever_machine_it_runs(machine, store, tmp_path):
    store.rounds.request(1, "train", "x")
    run_next_round(machine("a"), 1, FakeWorld().ports)
    store.rounds.request(1, "rank", "x")
    killed(machine("b"), "infer")
    record = store.rounds.running(1)
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
    store.rounds.release(record.id)
    world = FakeWorld()
    run_next_round(machine("c"), 1, world.ports)
    assert store.rounds.get(record.id).state == "done"
    assert world.published[0][0].checkpoint == str(tmp_path / "c/projects/1/rounds/1/train/model.pth")
    assert (tmp_path / "c/projects/1/rounds/1/train/model.pth").read_bytes() == b"weights of round 1"


@pytest.mark.parametrize("how", ["worked", "fetched"])
def test_a_machine_that_has_a_lost_round_ranks_with_the_new_round_of_its_number(machine, tmp_path, how):
    """``how`` it came by the files of the round of a database that is gone."""

    def database(name):
        url = {"database_url": f"sqlite:///{tmp_path}/state/{name}.db"}
        store = open_store(machine("a").model_copy(update=url))
        store.projects.connect(1, KEY, "<View/>", "http://ls", {"delta": 2.0})
        return store, lambda machine_name: machine(machine_name).model_copy(update=url)

    lost, on = database("lost")
    lost.rounds.request(1, "train", "x")
    run_next_round(on("b" if how == "worked" else "a"), 1, FakeWorld().ports)
    here = tmp_path / "b/projects/1/rounds/1/train/model.pth"
    Rounds(on("b")).fetch_checkpoint(KEY, "projects/1/rounds/1/train/model.pth")
    lost.close()
    assert here.read_bytes() == b"weights of round 1"
    new, on = database("new")
    new.rounds.request(1, "train", "x")
    world = FakeWorld()
    world.trained_weights = b"weights of the new round"
    run_next_round(on("a"), 1, world.ports)
    record = new.rounds.request(1, "rank", "x")
    run_next_round(on("b"), 1, FakeWorld().ports)
    assert new.rounds.get(record.id).state == "done"
    new.close()
    assert here.read_bytes() == b"weights of the new round"
    (replaced,) = here.parent.parent.parent.glob("1.replaced-*")
    assert (replaced / "train/model.pth").read_bytes() == b"weights of round 1"


def test_the_service_predicts_with_a_checkpoint_that_it_fetches(machine, store, tmp_path, monkeypatch):
    store.projects.connect(1, KEY, CONFIG, "http://ls", {"delta": 2.0})
    store.rounds.request(1, "train", "x")
    run_next_round(machine("a"), 1, FakeWorld().ports)
    predictor = FakePredictor()
    app = create_app(machine("service"), store, RecordingJobs(), predictor, images=FakeImages(tmp_path))
    payload = {"tasks": [{"id": 5, "data": {"image": "/data/5.jpg"}}], "project": KEY, "label_config": CONFIG}
    with monkeypatch.context() as patch:

        def broken(self, *_, **__):
            raise ConnectionResetError("the connection broke")

        patch.setattr("ppal_backend.rounds.bucket.WAIT_S", 0.0)
        patch.setattr(LocalFileSystem, "cat_file", broken)
        assert app.test_client().post("/predict", json=payload).status_code == 503, "nothing that would be stored"
    assert app.test_client().post("/predict", json=payload).status_code == 200
    ((model, images, _),) = predictor.calls
    assert model.checkpoint == str(tmp_path / "service/projects/1/rounds/1/train/model.pth")
    assert (tmp_path / "service/projects/1/rounds/1/train/model.pth").read_bytes() == b"weights of round 1"
    assert [image_id for image_id, _ in images] == [5]


@pytest.fixture
def predicting(machine, store, tmp_path):
    """A service that keeps one version, and a worker elsewhere: ``train()``, ``predict()``, ``checkpoints(name)``."""
    store.projects.connect(1, KEY, CONFIG, "http://ls", {"delta": 2.0})

    class Both:
        predictor = FakePredictor()
        settings = machine("service", keep_artifacts=1)
        app = create_app(settings, store, RecordingJobs(), predictor, images=FakeImages(tmp_path))

        def train(self):
            store.rounds.request(1, "train", "x")
            world = FakeWorld()
            world.publish = lambda spec, *_: f"ppal-r{spec.number}"
            run_next_round(machine("a", keep_artifacts=1), 1, world.ports)

        def predict(self):
            payload = {"tasks": [{"id": 5, "data": {"image": "/data/5.jpg"}}], "project": KEY, "label_config": CONFIG}
            assert self.app.test_client().post("/predict", json=payload).status_code == 200

        def checkpoints(self, name):
            return sorted(int(path.parts[-3]) for path in (tmp_path / name).rglob("*.pth"))

    return Both()


def test_a_service_removes_what_it_fetched_of_old_versions_as_the_worker_does(predicting, tmp_path):
    for _ in range(3):
        predicting.train()
        assert predicting.app.test_client().get("/ui/projects/1/queue").status_code == 200
        predicting.predict()
    assert predicting.checkpoints("a") == [3]
    assert predicting.checkpoints("service") == [3], "each was fetched to predict with it"
    pools = sorted(int(path.parts[-3]) for path in (tmp_path / "service").rglob("dataset/pool.json"))
    assert pools == [3], "each was fetched to show its queue"
    assert (tmp_path / "service/projects/1/rounds/1/query_set.json").is_file()


def test_pages_alone_remove_what_they_fetched_of_old_versions(predicting, tmp_path):
    for _ in range(3):
        predicting.train()
        assert predicting.app.test_client().get("/ui/projects/1/queue").status_code == 200
    assert [int(path.parts[-3]) for path in (tmp_path / "service").rglob("dataset/pool.json")] == [3]


def test_a_checkpoint_stays_for_as_long_as_a_prediction_reads_it(predicting):
    predicting.train()
    predict, seen = predicting.predictor.predict, []

    def meanwhile_there_is_another_version(model, images, timeout_s):
        predicting.predictor.predict = predict
        predicting.train()
        predicting.predict()
        seen.append(predicting.checkpoints("service"))
        return predict(model, images, timeout_s)

    predicting.predictor.predict = meanwhile_there_is_another_version
    predicting.predict()
    assert seen == [[1, 2]], "this one still reads the first"
    predicting.predict()
    assert predicting.checkpoints("service") == [2]


def test_a_service_whose_files_cannot_be_removed_now_predicts_all_the_same(predicting, monkeypatch, caplog):
    def away(*_, **__):
        raise StoreUnavailable("the state is away")

    predicting.train()
    with monkeypatch.context() as patch:
        patch.setattr("ppal_backend.operations.pruning.prune_project", away)
        predicting.train()
        predicting.predict()
    assert "old files stay for now: the state is away" in caplog.text


@pytest.fixture
def restored(machine, tmp_path):
    """A service whose machine fetched rounds 1 to 3 for pages and predictions, and then a state that knows none of
    them: ``train(version)`` makes its next round elsewhere."""

    class Restored:
        def __init__(self, name, keep_artifacts):
            url = {"database_url": f"sqlite:///{tmp_path}/state/{name}.db"}
            self.settings = machine("service", keep_artifacts=keep_artifacts).model_copy(update=url)
            self.elsewhere = machine("a", keep_artifacts=9).model_copy(update=url)
            self.store, self.predictor = open_store(self.settings), FakePredictor()
            self.store.projects.connect(1, KEY, CONFIG, "http://ls", {"delta": 2.0})
            images = FakeImages(tmp_path)
            self.app = create_app(self.settings, self.store, RecordingJobs(), self.predictor, images=images)

        def train(self, version):
            self.store.rounds.request(1, "train", "x")
            world = FakeWorld()
            world.trained_weights = f"weights of {version}".encode()
            world.publish = lambda *_: version
            run_next_round(self.elsewhere, 1, world.ports)

        def predict(self):
            payload = {"tasks": [{"id": 5, "data": {"image": "/data/5.jpg"}}], "project": KEY, "label_config": CONFIG}
            assert self.app.test_client().post("/predict", json=payload).status_code == 200

        def show(self):
            assert self.app.test_client().get("/ui/projects/1/queue").status_code == 200

    lost = Restored("lost", 9)
    for number in (1, 2, 3):
        lost.train(f"lost-{number}")
        lost.predict()
        lost.show()
    lost.store.close()
    new = Restored("new", 2)
    yield new
    new.store.close()


def test_a_service_predicts_with_no_checkpoint_of_a_lost_round(restored, tmp_path):
    restored.train("new-1")
    restored.predict()
    ((model, _, _),) = restored.predictor.calls
    assert model.checkpoint == str(tmp_path / "service/projects/1/rounds/1/train/model.pth")
    assert (tmp_path / "service/projects/1/rounds/1/train/model.pth").read_bytes() == b"weights of new-1"


def test_a_service_shows_no_round_that_is_lost(restored, tmp_path):
    restored.train("new-1")
    restored.show()
    rounds = tmp_path / "service/projects/1/rounds"
    identity = restored.store.rounds.last(1).identity
    assert json.loads((rounds / "1/round.json").read_text()) == {"identity": identity}


def test_a_command_beside_a_service_goes_back_to_no_lost_round(restored, tmp_path):
    restored.train("new-1")
    with pytest.raises(StopHere):
        roll_back(restored.settings, restored.store, StopHere(), 1, "new-1")
    assert (tmp_path / "service/projects/1/rounds/1/train/model.pth").read_bytes() == b"weights of new-1"


class StopHere(Exception):
    """A Label Studio that ends what is asked of it."""

    def model_version_counts(self, _project_id):
        raise self


def test_a_service_removes_lost_rounds_after_as_many_versions_as_are_kept(restored, tmp_path):
    rounds = tmp_path / "service/projects/1/rounds"
    restored.train("new-1")
    restored.predict()
    assert sorted(path.name.split("-")[0] for path in rounds.glob("*.replaced-*")) == [f"{i}.replaced" for i in "123"]
    time.sleep(1.1)  # the folders are named by whole seconds
    restored.train("new-2")
    restored.predict()
    assert len(list(rounds.glob("*.replaced-*"))) == 3, "one version since"
    restored.train("new-3")
    restored.predict()
    assert not list(rounds.glob("*.replaced-*")), "two versions since, and two are kept"


@pytest.fixture
def elsewhere(tmp_path):
    """Four rounds on machine ``a``, of which the bucket holds the last two whole, and the settings of machine ``b``."""
    shared = {"artifacts": f"file://{tmp_path}/bucket", "database_url": f"sqlite:///{tmp_path}/state/ppal.db"}
    place = Place(tmp_path / "a", keep_versions=1, keep_artifacts=2, **shared)
    for _ in range(4):
        place.round()
    place.here = load_settings(MODEL_DIR=tmp_path / "b", keep_versions=1, min_free_gib=0, **shared)
    yield place
    place.store.close()


@pytest.fixture
def run_here(run, elsewhere, monkeypatch):
    here = elsewhere.here
    for name, value in (("MODEL_DIR", here.model_dir), ("PPAL_ARTIFACTS", here.artifacts),
                        ("PPAL_DATABASE_URL", here.database_url)):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return run


def test_versions_that_a_machine_can_fetch_are_told_and_can_be_gone_back_to(elsewhere, run_here, monkeypatch):
    rows = json.loads(run_here("versions", 1, "--json").stdout)
    assert [row["files"] for row in rows] == [False, False, True, True], "of the others the bucket has marks alone"
    app = create_app(elsewhere.here, elsewhere.store, RecordingJobs(), FakePredictor(), images=FakeImages(None))
    page, listed = app.test_client(), []
    really = Bucket.names
    monkeypatch.setattr(Bucket, "names", lambda bucket, prefix: (listed.append(prefix), really(bucket, prefix))[1])
    for _ in range(3):
        shown = page.get("/ui/projects/1/live").text
    third = elsewhere.versions()[2]
    assert re.findall(r'<option value="([^"]+)"', shown) == [third]
    assert [prefix for prefix in listed if prefix.endswith("/rounds")] == ["projects/1.1/rounds"], "asked for once"
    done = roll_back(elsewhere.here, elsewhere.store, elsewhere.client, 1, third)
    assert done.published_again and elsewhere.store.versions.active(1).version == done.version


def test_versions_are_listed_while_the_bucket_is_away(elsewhere, run_here, monkeypatch):
    def away(*_):
        raise ArtifactsUnavailable("the bucket is away")

    monkeypatch.setattr(Bucket, "names", away)
    done = run_here("versions", 1, "--json")
    assert [row["files"] for row in json.loads(done.stdout)] == [False] * 4
    assert "which rounds of project 1 can be fetched is not known: the bucket is away" in done.stderr
    assert Rounds(elsewhere.settings).with_queue("1.1", 1, {2, 3, 4}) == {3, 4}, "those of this machine"


def test_a_model_is_exported_on_a_machine_that_fetches_it(elsewhere, run_here, monkeypatch):
    exported = []

    def export(detector, checkpoint, labels, out, layout, zoo_root):
        exported.append(checkpoint.read_bytes())
        return Exported(out, out, detector, (1, 3, 128, 160), 42, 0.001, 0.0001)

    monkeypatch.setattr("ppal_backend.detector.infer.exporting_model.export_model", export)
    assert run_here("export-model", 1, "--out", "m.onnx").exit_code == 0
    assert exported == [b"weights of round 4"]
    checkpoint = Rounds(elsewhere.here).path(1, 4) / "train" / "model.pth"
    checkpoint.write_bytes(b"something else")
    done = run_here("export-model", 1, "--out", "m.onnx")
    assert done.exit_code == 1 and "the file is damaged" in done.stderr and len(exported) == 1


def test_a_bucket_that_is_away_makes_the_round_wait_and_says_why(machine, store, monkeypatch):
    store.rounds.request(1, "train", "x")
    monkeypatch.setattr("ppal_backend.rounds.bucket.WAIT_S", 0.0)
    with monkeypatch.context() as patch:

        def broken(self, *_, **__):
            raise ConnectionResetError("the connection broke")

        patch.setattr(LocalFileSystem, "put_file", broken)
        world = FakeWorld()
        run_next_round(machine("a"), 1, world.ports)
        record = only(store)
        assert record.state == "running" and "to take projects/" in record.error and "3 times" in record.error
        assert not run_next_round(machine("b"), 1, FakeWorld().ports), "it has to wait a little"
    store.rounds.release(record.id)
    run_next_round(machine("a"), 1, world.ports)
    assert only(store).state == "done" and world.calls.count("train") == 1


def test_files_of_old_rounds_go_from_the_bucket_too(machine, store):
    settings = machine("a", keep_artifacts=1)
    for _ in range(2):
        store.rounds.request(1, "train", "x")
        world = FakeWorld()
        world.publish = lambda spec, *_: f"ppal-r{spec.number}"
        run_next_round(settings, 1, world.ports)
    names = Rounds(settings).bucket.names("projects")
    heavy = {n.split("/rounds/")[1][0] for n in names if n.endswith(".pth") or n.endswith(".npz")}
    assert heavy == {"2"}
    assert f"projects/{KEY}/rounds/1/query_set.json" in names
    assert prune_project(settings, store, 1) == []


def test_without_a_bucket_nothing_of_it_happens(tmp_path):
    assert Rounds(load_settings(MODEL_DIR=tmp_path)).bucket is None


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/prefix", "just-a-bucket"])
def test_the_address_of_a_bucket_holds_no_secret_and_is_one(tmp_path, url):
    with pytest.raises(SettingsError, match="expected an address") as told:
        load_settings(MODEL_DIR=tmp_path, artifacts=url)
    assert "secret" not in str(told.value)


def test_the_keys_of_the_bucket_are_blanked_like_any_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-of-the-bucket")
    assert "the-secret-of-the-bucket" in load_settings(MODEL_DIR=tmp_path).secrets


def test_a_worker_does_not_start_with_a_bucket_that_refuses_it(machine, monkeypatch):
    def refused(self, *_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", refused)
    with pytest.raises(SettingsError, match=r"expected to be let into PPAL_ARTIFACTS=file://.*set AWS_ACCESS_KEY_ID"):
        run_worker(machine("a"))
