"""What a snapshot of a project tells beside its images."""

import re
from pathlib import Path

import pytest

from ppal_backend.datasets.images import ImageInfo
from ppal_backend.doctor import from_problem
from ppal_backend.errors import ImageError
from ppal_backend.label_studio.source import LabelStudioSource
from tests.label_studio.fake import FakeLabelStudio
from tests.place import CONFIG


class NoImages:
    """An image cache that can have none."""

    def get(self, task_id, url):
        raise ImageError(f"no image of task {task_id}")


def region(name, control="label", x=10):
    value = {"x": x, "y": 10, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": ["cat"]}
    return {"id": name, "from_name": control, "type": "rectanglelabels", "value": value}


def test_the_report_counts_what_became_of_pre_annotations(tmp_path):
    fake = FakeLabelStudio(tasks=1)
    fake.project["label_config"] = CONFIG
    prediction = {"model_version": "ppal-r1-x", "result": [region("a"), region("b"), region("c", "other")]}
    result = [region("a"), region("b", x=20), region("d")]
    fake.add_task(7, [{"id": 1, "was_cancelled": False, "prediction": prediction, "result": result}])
    source = LabelStudioSource(fake.client(), NoImages(), 1)
    assert list(source.export(tmp_path)) == [1]
    told = source.prepare(tmp_path, lambda progress: None).report["agreement"]
    assert told == {"ppal-r1-x": {"tasks": 1, "kept": 1, "moved": 1, "relabelled": 0, "removed": 0, "added": 1}}


def test_few_images_are_asked_for_ahead_of_what_is_taken(monkeypatch):
    monkeypatch.setattr("ppal_backend.label_studio.source.FETCHES_AHEAD", 10)
    asked = []

    class Images:
        def get(self, task_id, url):
            asked.append(task_id)
            if task_id == 3:
                raise ImageError("task 3: it is gone")
            return ImageInfo(task_id, Path(url), 10, 10)

    source = LabelStudioSource(None, Images(), 1)
    found = source._fetch([(i, f"/{i}.jpg") for i in range(200)], "image")
    first = [next(found) for _ in range(5)]
    assert [i for i, _ in first] == [0, 1, 2, 3, 4] and first[3][1] == "task 3: it is gone"
    assert len(asked) <= 5 + 10
    assert [i for i, _ in found] == list(range(5, 200))


def prepared(fake, folder, images):
    source = LabelStudioSource(fake.client(), images, 1)
    source.export(folder)
    return source.prepare(folder, lambda progress: None)


class SomeImages:
    """An image cache that has those of tasks up to a number."""

    def __init__(self, up_to):
        self.up_to = up_to

    def get(self, task_id, url):
        if task_id > self.up_to:
            raise ImageError(f"task {task_id}: expected JPEG or PNG, got another kind of file; upload an image")
        return ImageInfo(task_id, Path(f"/{task_id}.jpg"), 100, 80)


def annotated(fake, *task_ids, result=None):
    for i in task_ids:
        fake.add_task(i, [{"id": i, "was_cancelled": False, "result": [region("a")] if result is None else result}])


@pytest.mark.parametrize(
    ("readable", "told"),
    [
        (
            0,
            r"^none of the 6 images can be used, 2 of them annotated: expected JPEG or .*6 x.; the first is task 1",
        ),
        (4, r"^2 of 6 images cannot be used: expected JPEG or PNG, .*2 x.; the first is task 5, make them readable"),
        (6, "^$"),
    ],
)
def test_images_that_cannot_be_used_are_counted_and_told(tmp_path, readable, told):
    """A project without a readable image looked healthy: its round was done, with a pool of nothing."""
    fake = FakeLabelStudio(tasks=6)
    fake.project["label_config"] = CONFIG
    annotated(fake, 1, 2)
    assert re.search(told, prepared(fake, tmp_path, SomeImages(readable)).problems["images"])


def test_the_key_that_the_data_lacks_is_named(tmp_path):
    """A config of another key than the tasks said: expected the address of an image, got ''."""
    fake = FakeLabelStudio(tasks=3)
    fake.project["label_config"] = CONFIG.replace("$image", "$photo.url")
    fake.tasks[3]["data"] = {"photo": {"url": "/data/upload/1/3.jpg"}}
    annotated(fake, 2)
    assert prepared(fake, tmp_path, SomeImages(9)).problems["images"] == (
        "2 of 3 images cannot be used, 1 of them annotated: expected the address of an image under 'photo.url' of the "
        "task's data, got none; correct the data, or the Image's value in the labeling config (2 x); the first is task "
        "2, make them readable and run a round"
    )


def test_addresses_of_a_template_are_those_of_each_task_and_what_is_missing_is_named(tmp_path):
    """Annotated tasks and the pool; such a config could not be connected."""
    fake = FakeLabelStudio(tasks=4)
    fake.project["label_config"] = CONFIG.replace("$image", "$base/dir/$file")
    for i in (1, 2, 3):
        fake.tasks[i]["data"] = {"base": "https://host.test", "file": f"{i}.jpg"}
    annotated(fake, 2)
    fake.tasks[2]["data"] = {"base": "https://host.test", "file": "2.jpg"}
    asked = {}

    class Images(SomeImages):
        def get(self, task_id, url):
            asked[task_id] = url
            return super().get(task_id, url)

    data = prepared(fake, tmp_path, Images(9))
    assert asked == {i: f"https://host.test/dir/{i}.jpg" for i in (1, 2, 3)}
    assert ([entry.image_id for entry in data.pool], data.unreadable) == ([1, 3], [4])
    assert (
        "1 of 4 images cannot be used: expected the address of an image under 'base' and 'file' of the task's"
        in (data.problems["images"])
    )


def test_what_people_drew_and_no_training_sees_is_told(tmp_path):
    fake = FakeLabelStudio(tasks=1)
    fake.project["label_config"] = CONFIG
    polygon = {"id": "p", "from_name": "label", "type": "polygonlabels", "value": {"polygonlabels": ["cat"]}}
    choice = {"id": "c", "from_name": "other", "type": "choices", "value": {"choices": ["sharp"]}}
    gone = region("g")
    gone["value"]["rectanglelabels"] = ["zebra"]
    thin, outside, turned = region("t"), region("o", x=-5), region("r")
    thin["value"]["width"] = 0.1
    turned["value"]["rotation"] = 30
    annotated(fake, 1, result=[region("a"), polygon, choice, gone, thin, outside, turned, "nonsense"])
    data = prepared(fake, tmp_path, SomeImages(9))
    assert data.problems["annotations"] == (
        "left out of the training: 1 boxes of labels that the labeling config lacks: 'zebra' (1) | "
        "1 boxes of less than a pixel inside the image | 1 regions without usable numbers or labels | "
        "1 regions of other kinds or controls: polygonlabels (1); other_shapes learns the boxes around them; "
        "correct these annotations, or the labeling config"
    )
    finding = from_problem("project 1: annotations", data.problems["annotations"])
    assert finding.advice == "correct these annotations, or the labeling config", "doctor's column of what to do"
    conversion = data.report["conversion"]
    assert (conversion["rotated"], conversion["clipped"], conversion["other_regions"]["choices"]) == (1, 1, 1)
    annotated(fake, 1, result=[region("a"), choice])
    assert prepared(fake, tmp_path, SomeImages(9)).problems["annotations"] == ""


def test_what_has_no_box_is_no_fault_of_the_annotations(tmp_path):
    """Relations between boxes, and labels of a text beside the image, were called annotations to correct."""
    fake = FakeLabelStudio(tasks=1)
    fake.project["label_config"] = CONFIG
    relation = {"from_id": "a", "to_id": "b", "type": "relation", "direction": "right", "labels": []}
    words = {"id": "w", "from_name": "ner", "to_name": "text", "type": "labels"}
    words["value"] = {"start": 0, "end": 4, "text": "cats", "labels": ["ANIMAL"]}
    annotated(fake, 1, result=[region("a"), region("b"), relation, words])
    data = prepared(fake, tmp_path, SomeImages(9))
    assert data.report["conversion"]["boxes"] == 2
    assert data.report["conversion"]["other_regions"] == {"relation": 1, "labels": 1}
    assert data.problems["annotations"] == ""


def test_a_pre_annotation_of_another_tool_without_numbers_fails_no_round(tmp_path):
    fake = FakeLabelStudio(tasks=1)
    fake.project["label_config"] = CONFIG
    shown = {"model_version": "other", "result": [region("a", x="10%")]}
    fake.add_task(1, [{"id": 1, "was_cancelled": False, "prediction": shown, "result": [region("a")]}])
    report = prepared(fake, tmp_path, SomeImages(9)).report
    assert (report["conversion"]["boxes"], report["agreement"]["other"]["moved"]) == (1, 1)


def test_boxes_of_a_second_control_are_told_with_the_option_that_learns_them(tmp_path):
    fake = FakeLabelStudio(tasks=1)
    second = '<RectangleLabels name="parts" toName="image"><Label value="ear"/></RectangleLabels></View>'
    fake.project["label_config"] = CONFIG.replace("</View>", second)
    annotated(fake, 1, result=[region("a"), region("b", control="parts")])
    told = prepared(fake, tmp_path, SomeImages(9)).problems["annotations"]
    assert (
        "1 regions of other kinds or controls: rectanglelabels (1); of several RectangleLabels one is learned" in told
    )
    assert "the option from_name names it" in told
