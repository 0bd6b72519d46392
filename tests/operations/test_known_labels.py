"""What people are told of the labels that the detector knows, on the command line and on the page."""

import json

import pytest
from typer.testing import CliRunner

from ppal_backend.cli import app as cli
from ppal_backend.operations.detectors import known_label_lines, known_labels
from ppal_backend.service.app import create_app
from ppal_backend.store import ModelVersion
from ppal_backend.structures.round import DetectorChoice
from tests.place import CONFIG
from tests.service.conftest import FakeImages, FakePredictor, RecordingJobs

BIRDS = CONFIG.replace('"cat"', '"penguin" predicted_values="bird"').replace(
    '"dog"', '"puffin" predicted_values="bird"'
)


def connect(place, config=CONFIG, **options):
    place.store.projects.connect(1, "1.1", config, "http://ls.test:8080", {"detector": "yolox_nano", **options})
    return place.store.projects.get(1)


def lines(place, config=CONFIG, **options):
    return known_label_lines(place.settings, place.store, connect(place, config, **options))


def test_what_is_known_from_where(place):
    assert known_labels(place.settings, connect(place)).plain == {"cat": ["cat"], "dog": ["dog"]}
    told = lines(place, BIRDS.replace("</Rect", '<Label value="fish"/></Rect'))
    assert told == [
        "yolox_nano knows labels before any training",
        "penguin, puffin: from `bird` (predicted_values)",
        "boxes of `bird` say penguin: a box bears one label, change it where it is puffin",
        "fish: trained from your first labels",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"detector": "retinanet_tiny"}, "the weights that retinanet_tiny starts from name no classes"),
        ({"detector": "retinanet_r50_fpn"}, "the weights that retinanet_r50_fpn starts from name no classes"),
        ({"detector": "faster_rcnn_tiny"}, "the weights that faster_rcnn_tiny starts from name no classes"),
        ({"init_weights": "random"}, "the weights that yolox_nano starts from name no classes"),
    ],
)
def test_why_there_are_no_boxes(place, options, said):
    assert lines(place, **options) == [f"no boxes before the first training: {said}"]


def test_prompts_are_known_of_every_label_and_told_in_one_line(place):
    config = CONFIG.replace('"cat"', '"k9" prompt="small cat"').replace('"dog"', '"Dog" alias="d"')
    record = connect(place, config, detector="mm_grounding_dino_t")
    assert known_labels(place.settings, record).plain == {"k9": ["small cat"], "d": ["Dog"]}
    assert lines(place, config, detector="mm_grounding_dino_t") == [
        "mm_grounding_dino_t knows labels before any training",
        "it looks for what the labels say: k9 as `small cat`, d as `Dog`",
    ]
    assert not known_labels(
        place.settings, connect(place, config, detector="mm_grounding_dino_t", init_weights="random")
    )


def test_before_the_detector_is_chosen_the_first_in_the_order_speaks(place):
    record = connect(place, detector="auto")
    assert known_label_lines(place.settings, place.store, record)[0] == "the detector knows labels before any training"
    place.store.projects.set_choice(1, DetectorChoice("retinanet_tiny", "trial", "nothing else can be had", "cpu"))
    told = known_label_lines(place.settings, place.store, place.store.projects.get(1))
    assert told == ["no boxes before the first training: the weights that retinanet_tiny starts from name no classes"]


def test_a_project_of_which_nothing_is_known_is_told_what_to_do(place):
    told = lines(place, CONFIG.replace('"cat"', '"coral"').replace('"dog"', '"kelp"'))
    assert "yolox_nano knows none of the labels" in told[0] and 'predicted_values="…"' in told[0]
    assert told[1:] == ["coral, kelp: trained from your first labels"]


def test_nothing_is_told_where_the_configuration_cannot_be_read_or_after_a_training(place):
    assert lines(place, "<View/>") == [] and lines(place, detector="of nobody") == []
    record = connect(place)
    for number, checkpoint in ((0, "projects/1/rounds/0/adopt/as_is.pth"), (1, "projects/1/rounds/1/train/final.pth")):
        version = ModelVersion(1, f"ppal-r{number}-x", number, "yolox_nano", checkpoint, ("cat", "dog"), None, {})
        place.store.versions.activate(version)
        assert bool(known_label_lines(place.settings, place.store, record)) == (number == 0)


def test_status_and_page_tell(place, monkeypatch):
    connect(place, BIRDS)
    monkeypatch.setenv("MODEL_DIR", str(place.settings.model_dir))
    shown = CliRunner().invoke(cli, ["status", "1"])
    assert shown.exit_code == 0 and "penguin, puffin: from `bird` (predicted_values)" in shown.output
    (row,) = json.loads(CliRunner().invoke(cli, ["status", "1", "--json"]).stdout)
    assert row["known_labels"][1] == "penguin, puffin: from `bird` (predicted_values)"
    service = create_app(
        place.settings, store=place.store, jobs=RecordingJobs(), predictor=FakePredictor(), images=FakeImages(None)
    )
    page = service.test_client().get("/ui/projects/1/").text
    assert "<li>penguin, puffin: from `bird` (predicted_values)</li>" in page
