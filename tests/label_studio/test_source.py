"""What a snapshot of a project tells beside its images."""

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
