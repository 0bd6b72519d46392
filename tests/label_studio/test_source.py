"""What a snapshot of a project tells beside its images."""

from pathlib import Path

from ppal_backend.datasets.images import ImageInfo
from ppal_backend.errors import ImageError
from ppal_backend.label_studio.source import LabelStudioSource
from tests.label_studio.fake import FakeLabelStudio
from tests.operations.conftest import CONFIG


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
    found = source._fetch([(i, f"/{i}.jpg") for i in range(200)])
    first = [next(found) for _ in range(5)]
    assert [i for i, _ in first] == [0, 1, 2, 3, 4] and first[3][1] == "task 3: it is gone"
    assert len(asked) <= 5 + 10
    assert [i for i, _ in found] == list(range(5, 200))
