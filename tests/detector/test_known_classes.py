"""Labels that are classes of the weights: by attribute, by name, by another word, and what people are told."""

import pytest

from ppal_backend.detector.zoo.known_classes import COCO_CLASSES, match_classes

AQUARIUM = ("fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray")


def known(labels, classes=COCO_CLASSES, **predicted_values):
    return match_classes(labels, predicted_values, classes)


def test_coco_has_80_names_each_once():
    assert len(set(COCO_CLASSES)) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[14], COCO_CLASSES[79]) == ("person", "bird", "toothbrush")


def test_every_class_of_coco_is_known_by_its_own_name_and_by_no_other():
    assert known(COCO_CLASSES).sources == {name: (name,) for name in COCO_CLASSES}
    assert set(known(COCO_CLASSES).origins.values()) == {"name"}


@pytest.mark.parametrize(
    ("label", "name", "origin"),
    [
        ("car", "car", "name"),
        ("Cars", "car", "name"),
        ("PERSON", "person", "name"),
        ("traffic_lights", "traffic light", "name"),
        ("Stop-Sign", "stop sign", "name"),
        ("knives", "knife", "name"),
        ("buses", "bus", "name"),
        ("wine glasses", "wine glass", "name"),
        ("ski", "skis", "name"),
        ("toothbrushes", "toothbrush", "name"),
        ("automobile", "car", "synonym"),
        ("Lorries", "truck", "synonym"),
        ("people", "person", "synonym"),
        ("motorbikes", "motorcycle", "synonym"),
        ("TV_monitor", "tv", "synonym"),
        ("Sofa", "couch", "synonym"),
    ],
)
def test_case_plural_and_other_words_do_not_matter(label, name, origin):
    found = known((label,))
    assert (found.sources, found.origins) == ({label: (name,)}, {label: origin})


@pytest.mark.parametrize("label", ["fish", "glass", "caravan", "carp", "s", "es", "", "birdhouse", "Kuh", "日本", "💥"])
def test_what_is_no_class_is_not_known(label):
    assert not known((label,))


def test_no_label_known_is_said():
    assert known(AQUARIUM).sentences() == [
        "fish, jellyfish, penguin, puffin, shark, starfish, stingray: trained from your first labels"
    ]


def test_the_attribute_names_classes_and_people_are_told():
    found = known(AQUARIUM, penguin=("bird",), puffin=("bird",))
    assert found.sources == {"penguin": ("bird",), "puffin": ("bird",)}
    assert found.sentences() == [
        "penguin, puffin: from `bird` (predicted_values)",
        "boxes of `bird` say penguin: a box bears one label, change it where it is puffin",
        "fish, jellyfish, shark, starfish, stingray: trained from your first labels",
    ]


def test_several_classes_of_one_label():
    found = known(("vehicle",), vehicle=("cars", "truck", "Bus", "automobile"))
    assert found.sources == {"vehicle": ("car", "truck", "bus")}
    assert found.sentences() == ["vehicle: from `car` and `truck` and `bus` (predicted_values)"]


def test_two_words_for_one_class_both_are_known_and_boxes_say_the_surer_one():
    found = known(("automobile", "car", "van"), van=("car",))
    assert found.sources == dict.fromkeys(("automobile", "car", "van"), ("car",))
    assert list(found.plain) == ["van", "car", "automobile"], "the attribute, then the name, then another word"
    assert "boxes of `car` say van: a box bears one label, change it where it is car or automobile" in found.sentences()


def test_names_that_the_weights_do_not_know_are_told_and_the_others_count():
    found = known(("puffin", "car"), puffin=("brid", "bird", "Nebelkrähe"), car=("auto",))
    assert found.sources == {"puffin": ("bird",), "car": ("car",)}, "of no use, the attribute leaves it to the name"
    assert found.unknown_names == {"puffin": ("brid", "Nebelkrähe"), "car": ("auto",)}
    told = found.sentences()
    assert "puffin: its predicted_values names `brid`, which is no class of the detector; did you mean `bird`?" in told
    assert any(line.startswith("puffin: its predicted_values names `Nebelkrähe`") and "person" in line for line in told)


def test_a_label_with_an_alias_is_known_by_what_people_read():
    found = match_classes(("c1", "dog"), {}, COCO_CLASSES, {"c1": "Automobile", "dog": "Wolf"})
    assert found.sources == {"c1": ("car",), "dog": ("dog",)}
    assert found.origins == {"c1": "synonym", "dog": "name"}


def test_an_empty_attribute_says_that_the_name_means_something_else():
    assert not known(("mouse",), mouse=())
    assert known(("mouse",)).sources == {"mouse": ("mouse",)}


def test_a_hundred_labels_make_few_lines():
    labels = (*(f"part {i}" for i in range(99)), "dog")
    lines = known(labels).sentences()
    assert lines[0] == "dog: from `dog` (same name)" and len(lines) == 2
    assert "and 87 more: trained from your first labels" in lines[1] and len(lines[1]) < 300


def test_weights_of_other_classes():
    assert known(("helmet", "Helmets"), classes=("helmet", "Helmet")).sources == {
        "helmet": ("helmet",),
        "Helmets": ("helmet",),
    }
    assert not known(("car",), classes=())
