"""Quotas as people write them."""

import pytest

from ppal_backend.structures.steering import Quota, Steering, comparable


@pytest.mark.parametrize(
    ("text", "quota", "words"),
    [
        ("30% label:stingray", Quota("label", "stingray", 0.3), "at least 30 % with stingray"),
        (" 12.5 % data:camera=north 2", Quota("data", "north 2", 0.125, "camera"),
         "at least 12.5 % with camera = north 2"),
        ("100%storage:s3://b/day1/", Quota("storage", "s3://b/day1/", 1.0), "at least 100 % from s3://b/day1/"),
        ("5% label:a:b=c", Quota("label", "a:b=c", 0.05), "at least 5 % with a:b=c"),
    ],
)  # fmt: skip
def test_a_quota_is_read_and_said(text, quota, words):
    assert Quota.parse(text) == quota and quota.text == words


@pytest.mark.parametrize(
    "text",
    ["", "label:a", "0% label:a", "101% label:a", "30% a", "30% color:a", "30% label:", "30% data:a", "30% data:=a",
     "30% data:a=", "-5% label:a", "30% label:" + "a" * 301, "nan% label:a"],
)  # fmt: skip
def test_what_is_no_quota_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="label:stingray"):
        Quota.parse(text)


def test_images_that_a_set_needs_are_whole_and_never_too_few():
    assert [Quota("label", "a", share).needed(10) for share in (0.3, 0.301, 0.1, 1.0)] == [3, 4, 1, 10]
    assert Quota("label", "a", 0.07).needed(100) == 7 and Quota("label", "a", 0.3).needed(0) == 0


def test_an_image_counts_by_its_labels_its_data_or_its_address():
    data = comparable({"image": "s3://b/day1/x.jpg", "camera": 3, "night": True, "boxes": [1], "none": None})
    assert data == {"image": "s3://b/day1/x.jpg", "camera": "3", "night": "true"}
    assert Quota("label", "a", 0.5).holds({"a", "b"}, {}) and not Quota("label", "c", 0.5).holds({"a"}, {})
    assert Quota("data", "3", 0.5, "camera").holds((), data) and not Quota("data", "30", 0.5, "camera").holds((), data)
    assert Quota("storage", "s3://b/day1/", 0.5).holds((), data)
    assert not Quota("storage", "/day1/", 0.5).holds((), data), "an address begins with it"


def test_steering_survives_json_and_names_a_task_once():
    asked = Steering((3, 1), (2,), (Quota("data", "3", 0.5, "camera", 7),))
    assert Steering.from_dict(asked.as_dict()) == asked and Steering.from_dict(None) == Steering()
    with pytest.raises(ValueError, match="once"):
        Steering((1,), (1,))
