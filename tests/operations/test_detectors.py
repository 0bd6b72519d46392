"""A project that names no detector: chosen once, kept, told, changed; and weights that cannot be had."""

import hashlib
import os
import subprocess
import sys
from functools import partial

import pytest

from ppal_backend.doctor.health import project_state
from ppal_backend.engines.local import LocalEngine
from ppal_backend.errors import StateError, UnknownDetector, WeightsUnavailable
from ppal_backend.operations.detectors import check_named, choose_by_hand, in_force
from ppal_backend.rounds.ports import Ports
from ppal_backend.settings import load_settings
from ppal_backend.store import Heartbeat, open_store
from ppal_backend.structures.round import DetectorChoice
from ppal_backend.worker.round_process import run_next_round
from tests.detector.test_choice import ENTRY, OFFLINE, WEIGHTS, Net
from tests.place import Place
from tests.rounds.fakes import FakeWorld

DIGEST_OF = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("good", "filed", "toy")}


@pytest.fixture
def net(monkeypatch):
    made = Net()
    monkeypatch.setattr("urllib.request.urlopen", made)
    return made


@pytest.fixture
def place(tmp_path, net, monkeypatch):
    """A project that names no detector, with a zoo of ``good`` (at an address), ``filed`` (a file) and ``toy``."""
    monkeypatch.delenv("PPAL_DETECTOR")
    monkeypatch.setenv("DEVICE", "cpu")
    root = tmp_path / "zoo"
    root.mkdir()
    (root / "one.py").write_text("")
    (root / "toy.pth").write_bytes(b"toy")
    text = '[auto]\ncuda = ["good"]\ncpu = ["good", "filed"]\ntrial = "toy"\n'
    for name, origin in (("good", 'url = "http://good.test/good.pth"'), ("filed", 'file = "filed.pth"'),
                         ("toy", 'path = "toy.pth"')):  # fmt: skip
        digest = DIGEST_OF[name]
        text += ENTRY.format(name=name, more=WEIGHTS.format(name=name, origin=origin, digest=digest))
    (root / "zoo.toml").write_text(text)
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    made = AutoPlace(tmp_path / "data", zoo_dir=root, PPAL_CACHE=tmp_path / "cache")
    yield made
    made.store.close()
    made.client.close()


class AutoPlace(Place):
    """With the spec of the last round, and rounds of any project."""

    spec = None

    def ports(self, settings, store, project, spec, observer):
        self.spec = spec
        return Ports(self.world, self.world, self.world, observer)

    def rounds_detector(self, kind="rank", project=1):
        """Run a round; the detector it was given, None where it never came so far, and its record."""
        record, self.spec, self.world = self.store.rounds.request(project, kind, "test"), None, FakeWorld()
        run_next_round(self.settings, project, partial(self.ports))
        return self.spec and self.spec.detector, self.store.rounds.get(record.id)

    def put(self, name, content=None):
        (self.settings.weights_dir / f"{name}.pth").write_bytes(name.encode() if content is None else content)

    def choice(self, project=1):
        return self.store.projects.get(project).choice

    def told(self, project=1):
        return in_force(self.settings, self.store.projects.get(project))


def test_the_first_round_chooses_and_the_choice_stays(place, net):
    assert (place.told().name, place.told().named) == ("", False) and "the first round" in place.told().text
    assert place.rounds_detector()[0] == "good"
    assert place.choice() == DetectorChoice("good", "rule", "trains on a CPU; its weights can be downloaded", "cpu")
    place.put("filed")
    net.down["good.test"] = OFFLINE
    place.put("good")
    assert place.rounds_detector("train")[0] == "good", "it is kept though the first that can be had is another now"
    assert place.told().text == "auto: good (trains on a CPU; its weights can be downloaded)"
    assert place.told().advice == ""


def test_the_choice_outlives_a_restart_and_another_project_has_its_own(place, net):
    net.down["good.test"] = OFFLINE
    place.put("filed")
    assert place.rounds_detector()[0] == "filed"
    place.store.close()
    place.store = open_store(place.settings)
    net.down.clear()
    assert place.rounds_detector()[0] == "filed"
    place.store.projects.connect(2, "2.1", place.store.projects.get(1).label_config, "http://ls.test:8080", {})
    assert place.choice(2) is None
    assert place.rounds_detector(project=2)[0] == "good" and place.choice().detector == "filed"


def test_a_project_set_up_afresh_under_the_same_id_chooses_anew(place):
    place.rounds_detector()
    place.store.projects.connect(1, "1.2", place.store.projects.get(1).label_config, "http://ls.test:8080", {})
    assert place.choice() is None


def test_without_any_weights_the_one_for_trying_out_is_taken_told_and_replaced_by_the_command_told(place, net):
    net.down["good.test"] = OFFLINE
    detector, record = place.rounds_detector("train")
    assert (detector, record.state, place.choice().by) == ("toy", "done", "trial")
    (finding,) = project_state(place.settings, place.store, place.store.projects.get(1))
    assert (finding.state, finding.title) == ("warning", "The detector is not for photographs")
    assert finding.seen.startswith(
        "toy was made for trying out; it will not work on photographs (trains on a CPU; not "
    )
    to = f"--to {place.settings.weights_dir}"
    assert finding.advice == (
        f"run `ppal zoo fetch good --from FILE {to}` (FILE: http://good.test/good.pth) or `ppal zoo fetch filed --from "
        f"FILE {to}` (FILE: filed.pth) on the machine where detectors train; the next round then changes over by "
        "itself, and `ppal round 1 --rank` starts one"
    )
    assert place.rounds_detector()[0] == "toy"
    given = place.settings.model_dir / "given.pth"
    given.write_bytes(b"filed")
    command = ["zoo", "fetch", "filed", "--from", str(given), "--to", str(place.settings.weights_dir)]
    environment = {**os.environ, "PPAL_MODEL_ZOO": str(place.settings.zoo_dir)}
    subprocess.run([sys.executable, "-m", "ppal_backend.cli", *command], env=environment, check=True, timeout=120)
    detector, record = place.rounds_detector("train")
    assert (detector, record.state, place.choice().by, place.told().advice) == ("filed", "done", "rule", "")


def test_weights_deleted_after_the_choice_fail_a_training_before_it_reads_anything(place, net):
    """They were missed after the export and after all images were fetched."""
    net.down["good.test"] = OFFLINE
    place.put("filed")
    place.rounds_detector()
    (place.settings.weights_dir / "filed.pth").unlink()
    detector, record = place.rounds_detector("rank")
    assert (detector, record.state) == ("filed", "done"), "ordering the queue needs no weights"
    told = place.store.projects.get(1).problems["detector"]
    assert told.startswith("the initial weights of filed cannot be had: there is no file ")
    detector, record = place.rounds_detector("train")
    assert (detector, record.state, record.error) == (None, "failed", told) and place.world.calls == []
    assert "filed.pth (a drawer, sha256 " in told and "run `ppal zoo fetch filed --from FILE --to " in told
    place.put("filed")
    assert place.rounds_detector("train")[1].state == "done"
    assert "detector" not in place.store.projects.get(1).problems


def test_deleted_weights_with_an_address_that_answers_are_fetched_again(place):
    place.put("good")
    place.rounds_detector()
    (place.settings.weights_dir / "good.pth").unlink()
    assert place.rounds_detector("train")[1].state == "done"


def test_damaged_weights_fail_a_training_and_name_the_file(place):
    place.put("good")
    place.rounds_detector()
    place.put("good", b"cut off")
    _, record = place.rounds_detector("train")
    assert record.state == "failed"
    assert f"{place.settings.weights_dir / 'good.pth'} is damaged or another file; get http://good.test" in record.error


@pytest.mark.parametrize(("start", "state"), [("random", "done"), ("last", "failed"), ("zoo", "failed")])
def test_a_training_that_starts_from_nothing_needs_no_weights(place, net, start, state):
    net.down["good.test"] = OFFLINE
    options = {"detector": "filed", "init_weights": start}
    place.store.projects.connect(1, "1.1", place.store.projects.get(1).label_config, "http://ls.test:8080", options)
    assert place.rounds_detector("train")[1].state == state


def test_a_training_that_goes_on_from_the_last_version_needs_none_either(place):
    place.put("filed")
    options = {"detector": "filed", "init_weights": "last"}
    place.store.projects.connect(1, "1.1", place.store.projects.get(1).label_config, "http://ls.test:8080", options)
    assert place.rounds_detector("train")[1].state == "done"
    (place.settings.weights_dir / "filed.pth").unlink()
    assert place.rounds_detector("train")[1].state == "done"


def test_a_detector_that_left_the_zoo_is_replaced_and_said_so(place):
    place.store.projects.set_choice(1, DetectorChoice("gone", "rule", "x", "cpu"))
    assert place.rounds_detector()[0] == "good"
    assert place.choice().reason.startswith("gone, chosen before, is not in the zoo any more; trains on a CPU")


def test_a_person_chooses_and_a_failed_round_is_tried_again(place, net):
    net.down["good.test"] = OFFLINE
    place.rounds_detector()
    edits = place.store.projects.get(1).edits
    with pytest.raises(WeightsUnavailable, match="initial weights of filed cannot be had: there is no file"):
        choose_by_hand(place.settings, place.store, 1, "filed")
    with pytest.raises(UnknownDetector, match="got 'yolo99'"):
        choose_by_hand(place.settings, place.store, 1, "yolo99")
    assert place.choice().detector == "toy"
    place.put("filed")
    assert choose_by_hand(place.settings, place.store, 1, "filed").by == "person"
    assert place.store.projects.get(1).edits == edits + 1
    net.down.clear()
    assert place.rounds_detector()[0] == "filed", "the rule would take good now"
    assert choose_by_hand(place.settings, place.store, 1, "toy").by == "person"
    assert (place.rounds_detector()[0], place.told().advice) == ("toy", ""), "whoever chose it knows"
    assert choose_by_hand(place.settings, place.store, 1, "auto") is None
    assert place.rounds_detector()[0] == "good"


def test_a_named_detector_is_changed_where_it_is_named(place):
    place.put("filed")
    config = place.store.projects.get(1).label_config
    place.store.projects.connect(1, "1.1", config, "http://ls.test:8080", {"detector": "filed"})
    with pytest.raises(StateError, match=r"names filed; change 'detector' in its extra parameters"):
        choose_by_hand(place.settings, place.store, 1, "good")
    assert (place.told().text, place.told().named) == ("filed (named by the settings)", True)
    assert place.rounds_detector()[0] == "filed" and place.choice() is None


def test_a_project_may_ask_for_a_choice_where_the_operator_names_one(place, monkeypatch):
    place.settings = place.settings.model_copy(update={"detector": "toy"})
    assert place.rounds_detector()[0] == "toy" and place.told().named
    config = place.store.projects.get(1).label_config
    place.store.projects.connect(1, "1.1", config, "http://ls.test:8080", {"detector": "auto"})
    assert place.rounds_detector()[0] == "good" and not place.told().named


def test_a_gpu_is_asked_for_where_detectors_train(place, monkeypatch):
    asked = []

    def kind_of(self, device):
        asked.append(device)
        return "cuda"

    monkeypatch.setattr("ppal_backend.engines.local.LocalEngine.kind_of", kind_of)
    place.rounds_detector()
    place.rounds_detector()
    assert place.choice().reason.startswith("trains on a GPU") and place.choice().device == "cuda"
    assert asked == ["cpu"], "a kept choice asks nobody"


def test_what_the_nodes_of_a_cluster_have_is_not_judged_from_here(place, monkeypatch):
    monkeypatch.setattr("ppal_backend.worker.round_process._engine", lambda _: LocalEngine())
    place.settings = place.settings.model_copy(update={"engine": "ray", "detector": "filed"})
    detector, record = place.rounds_detector("train")
    assert (detector, record.state, place.store.projects.get(1).problems) == ("filed", "done", {})


def test_named_weights_are_looked_for_where_rounds_run(place, net, monkeypatch):
    net.down["good.test"] = OFFLINE
    named = place.settings.project_options({"detector": "good"})
    with pytest.raises(WeightsUnavailable, match="of good cannot be had"):
        check_named(place.settings, place.store, named)
    heart = Heartbeat(place.store.workers)
    heart.beat()
    with pytest.raises(WeightsUnavailable, match="of good cannot be had"):
        check_named(place.settings, place.store, named)
    heart.end()
    place.store.workers.beat("elsewhere:1:2.00")
    check_named(place.settings, place.store, named)


def test_the_default_is_auto(monkeypatch, tmp_path):
    monkeypatch.delenv("PPAL_DETECTOR")
    assert load_settings(MODEL_DIR=tmp_path).detector == "auto"
