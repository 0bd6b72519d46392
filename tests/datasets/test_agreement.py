"""Kept, moved, relabelled, removed, added, and seconds saved: what an export tells of pre-annotations."""

import pytest

from ppal_backend.datasets.corrections import agreement_of, corrections_of, labeling_times

V1, V2 = "ppal-r1-aaa", "ppal-r2-bbb"


def box(region, x=10.0, label="cat", control="label", kind="rectanglelabels", **value):
    numbers = {"x": x, "y": 20.0, "width": 30.0, "height": 40.0, "rotation": 0, **value}
    return {"id": region, "from_name": control, "type": kind, "value": {**numbers, kind: [label]}}


def task(shown, submitted, version=V1, score=0.1, **annotation):
    prediction = {"id": 7, "model_version": version, "score": score, "result": shown}
    return {"id": 1, "annotations": [{"id": 1, "prediction": prediction, "result": submitted, **annotation}]}


def counts(*tasks):
    found = agreement_of(corrections_of(iter(tasks), "label"))
    return {version: tuple(count.values()) for version, count in found.items()}


def test_every_box_is_counted_once_by_what_became_of_it():
    shown = [box("a"), box("b"), box("c"), box("d", label="dog")]
    submitted = [box("a"), box("b", x=12.0), box("c", label="dog", x=50.0), box("new")]
    found = agreement_of(corrections_of([task(shown, submitted)], "label"))
    wanted = {"tasks": 1, "kept": 1, "moved": 1, "relabelled": 1, "removed": 1, "added": 1}
    assert found == {V1: wanted}


def test_versions_are_kept_apart_and_tasks_add_up():
    found = counts(task([box("a")], [box("a")]), task([], [box("n")]), task([box("a")], [], version=V2))
    assert found == {V1: (2, 1, 0, 0, 0, 1), V2: (1, 0, 0, 0, 1, 0)}


@pytest.mark.parametrize("change", [{"y": 20.02}, {"width": 31}, {"height": 39.5}, {"rotation": 3}])
def test_any_number_of_the_frame_moves_a_box(change):
    assert counts(task([box("a")], [box("a", **change)])) == {V1: (1, 0, 1, 0, 0, 0)}


def test_what_the_editor_rounds_is_no_move():
    untouched = box("a", x=10.000000001, rotation=None)
    assert counts(task([box("a")], [untouched])) == {V1: (1, 1, 0, 0, 0, 0)}


@pytest.mark.parametrize("value", ["abc", [1], {"a": 1}, True, "12"])
def test_places_that_are_no_numbers_are_compared_as_they_are(value):
    """Label Studio stores predictions and annotations of other tools unchecked: one such box failed every round."""
    assert counts(task([box("a", x=value)], [box("a", x=value)])) == {V1: (1, 1, 0, 0, 0, 0)}
    assert counts(task([box("a", x=value)], [box("a")])) == {V1: (1, 0, 1, 0, 0, 0)}
    assert counts(task([box("a")], [box("a", x=value)])) == {V1: (1, 0, 1, 0, 0, 0)}


@pytest.mark.parametrize(
    "annotation",
    [{"was_cancelled": True}, {"prediction": {}}, {"prediction": None}, {"prediction": {"result": [box("a")]}}],
)
def test_skipped_tasks_and_those_without_a_prediction_tell_nothing(annotation):
    assert counts(task([box("a")], [box("a")], **annotation)) == {}
    assert counts({"id": 1, "annotations": []}) == {}


def test_regions_of_others_do_not_count():
    others = [box("p", kind="polygonlabels"), box("o", control="other"), "broken", {"type": "rectanglelabels"}]
    assert counts(task([box("a"), *others], [box("a"), *others])) == {V1: (1, 1, 0, 0, 0, 0)}
    assert counts(task(None, None)) == {V1: (1, 0, 0, 0, 0, 0)}


def test_boxes_without_ids_are_two_boxes():
    assert counts(task([box(None)], [box(None), box(None)])) == {V1: (1, 0, 0, 0, 1, 2)}


def test_the_annotation_that_training_uses_is_the_one_that_counts():
    one = task([box("a")], [])["annotations"][0] | {"updated_at": "2026-01-01T00:00:00Z"}
    later = task([box("a")], [box("a")])["annotations"][0] | {"id": 2, "updated_at": "2026-01-02T00:00:00Z"}
    assert counts({"id": 1, "annotations": [later, one]}) == {V1: (1, 1, 0, 0, 0, 0)}


@pytest.mark.parametrize(
    "annotation",
    [
        pytest.param({"parent_prediction": 6}, id="began with another prediction"),
        pytest.param({"result": [{**box("old"), "origin": "prediction"}]}, id="keeps a box of a deleted one"),
        pytest.param({"result": [{**box("old"), "origin": "prediction-changed"}]}, id="moved a box of a deleted one"),
        pytest.param({"parent_prediction": 6, "prediction": {}}, id="the version in force had none"),
    ],
)
def test_boxes_that_nobody_was_shown_tell_nothing(annotation):
    """Label Studio notes the version in force when a task is submitted, also where it was opened before."""
    open_while_published = task([box("a"), box("b")], [box("old")], lead_time=9.0, **annotation)
    assert corrections_of([open_while_published], "label") == []


@pytest.mark.parametrize("parent", [7, None])
def test_boxes_that_were_shown_count_beside_copies_of_them(parent):
    drawn = [{**box("a"), "origin": "prediction"}, {**box("copy", x=50.0), "origin": "prediction"}, box("new")]
    assert counts(task([box("a"), box("b")], drawn, parent_prediction=parent)) == {V1: (1, 1, 0, 0, 1, 2)}


def test_second_opinions_are_asked_for_without_boxes_and_are_no_additions():
    second = task([], [box("n")], score=0.0, parent_prediction=7, lead_time=9.0)
    assert counts(second, task([box("a")], [box("a")])) == {V1: (1, 1, 0, 0, 0, 0)}
    assert labeling_times(corrections_of([second], "label"))["without"]["images"] == 1
    other = task([box("a")], [box("a")], version="yolov8", score=0.0)
    assert counts(other) == {"yolov8": (1, 1, 0, 0, 0, 0)}, "other tools write 0 for no score"


def took(seconds, shown=(), who=1, **annotation):
    return task(list(shown), [], lead_time=seconds, completed_by={"id": who}, **annotation)


def test_seconds_are_medians_with_and_without_proposed_boxes():
    tasks = [took(s, [box("a")]) for s in (4.0, 6.0, 100.0)] + [took(s) for s in (10, 30)]
    tasks.append(took(8.0, [box("a", control="other")]))
    assert labeling_times(corrections_of(tasks, "label")) == {
        "with": {"images": 3, "median_s": 6.0, "out": 0},
        "without": {"images": 3, "median_s": 10, "out": 0},
    }


def test_a_lunch_break_does_not_count():
    tasks = [took(s) for s in (9, 10, 11, 12, 13, 3600)]
    assert labeling_times(corrections_of(tasks, "label")) == {"without": {"images": 5, "median_s": 11, "out": 1}}


@pytest.mark.parametrize("seconds", [None, 0, -3, float("nan"), float("inf"), "12", True])
def test_a_time_that_was_not_measured_does_not_count(seconds):
    assert labeling_times(corrections_of([took(seconds), task([], [])], "label")) == {}


def test_annotators_are_told_apart_only_when_asked_for():
    tasks = [took(4.0), took(8.0, who=2), took(2.0, [box("a")], who=2)]
    assert sorted(labeling_times(corrections_of(tasks, "label"))) == ["with", "without"]
    found = labeling_times(corrections_of(tasks, "label"), by_annotator=True)
    assert {group: row["median_s"] for group, row in found.items()} == {
        "with": 2.0, "with 2": 2.0, "without": 6.0, "without 1": 4.0, "without 2": 8.0,
    }  # fmt: skip


def test_an_annotator_may_be_a_bare_number():
    found = labeling_times(corrections_of([task([], [], lead_time=3.0, completed_by=5)], "label"), by_annotator=True)
    assert "without 5" in found
