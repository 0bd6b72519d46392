"""Approving pre-annotations in bulk, against a Label Studio in memory."""

import json
from dataclasses import replace

import httpx
import pytest

from ppal_backend.datasets.precision import THRESHOLDS, measured
from ppal_backend.errors import LabelStudioUnavailable, StateError
from ppal_backend.operations.approvals import approve, offer, precision_at, regions_of, undo
from ppal_backend.rounds.evaluation_set import EVALUATION, TRAINING
from ppal_backend.store.approvals import CLAIM_S
from tests.place import CONFIG, Place
from tests.rounds.fakes import detections_of

ROW = {"boxes": 200, "kept": 190, "images": 50, "kept_kept": 740, "kept_boxes": 770, "boxes_boxes": 810,
       "whole": 30, "untouched": 27}  # fmt: skip
FACTS = {"precision": {"ppal-r1": {f"{t:g}": ROW for t in THRESHOLDS}}}
MEASURED = precision_at(FACTS, 0.5)


@pytest.fixture
def place(make_place):
    place = make_place(Place)
    place.round()
    return place


def sure(least=0.5, shown=0.3):
    """Tasks of the pool whose every box that is shown is as sure, as the fake detector sees them."""
    found = {}
    for task_id in range(1000, 1030):
        scores = [float(s) for s in detections_of(task_id).scores if s >= shown]
        if scores and min(scores) >= least:
            found[task_id] = min(scores)
    return found


def approved(place, tasks, precision=MEASURED, **more):
    version = place.store.versions.active(1).version
    return approve(place.settings, place.store, place.client, 1, version, precision, tasks, **more)


def annotations(place, task_id):
    return place.label_studio.tasks[task_id]["annotations"]


def test_offered_are_unlabelled_tasks_whose_every_box_is_sure_the_surest_first(place):
    threshold = place.settings.project_options({}).score_threshold
    reserve = json.loads((place.folder(1) / "query_set.json").read_text())["reserve"]
    wanted = {i: s for i, s in sure(0.5, threshold).items() if i not in reserve}
    assert set(sure(0.5, threshold)) & set(reserve), "some that are sure enough are kept to measure the detector"
    found = offer(place.settings, place.store, 1, MEASURED)
    assert len(wanted) >= 4 and found.tasks == pytest.approx(wanted)
    assert list(found.tasks) == sorted(wanted, key=lambda i: -wanted[i])
    regions = regions_of(place.settings, place.store, 1, found.version, list(found.tasks), 0.5)
    assert set(regions) == set(wanted)
    assert all(len(rows) == sum(s >= threshold for s in detections_of(i).scores) for i, rows in regions.items())


def test_only_boxes_that_annotators_are_shown_have_to_be_sure(place):
    config = CONFIG.replace('toName="', 'model_score_threshold="0.7" toName="', 1)
    assert config != CONFIG
    place.store.projects.connect(1, "1.1", config, "http://ls.test:8080", {})
    reserve = json.loads((place.folder(1) / "query_set.json").read_text())["reserve"]
    wanted = {i: s for i, s in sure(0.5, 0.7).items() if i not in reserve}
    assert len(wanted) > len([i for i in sure(0.5, 0.3) if i not in reserve]), "no image has a hidden doubtful box"
    found = offer(place.settings, place.store, 1, MEASURED)
    assert found.tasks == pytest.approx(wanted)
    assert set(regions_of(place.settings, place.store, 1, found.version, list(found.tasks), 0.5)) == set(wanted)


def test_nothing_is_offered_or_approved_before_the_precision_is_measured(place):
    few = measured({"ppal-r1": {"0.5": {**ROW, "boxes": 90, "kept": 80, "images": 12}}})[0]
    assert offer(place.settings, place.store, 1, few).tasks == {}
    with pytest.raises(StateError, match=r"at 0\.5, 10 boxes and 8 images are missing"):
        approved(place, [1000], few)
    with pytest.raises(StateError, match=r"a confidence that is measured \(0.5, 0.6.*got 0.3"):
        precision_at(FACTS, 0.3)


def test_what_measures_the_detector_is_never_offered(place):
    first, second = list(offer(place.settings, place.store, 1, MEASURED).tasks)[:2]
    place.store.sides.add(1, 1, {first: EVALUATION, second: TRAINING})
    assert first not in offer(place.settings, place.store, 1, MEASURED).tasks
    assert approved(place, [first, second]).tasks == (second,) and annotations(place, first) == []


def test_approved_boxes_are_annotations_that_are_marked_and_can_be_undone(place):
    first, second, *_ = offer(place.settings, place.store, 1, MEASURED).tasks
    done = approved(place, [first, second, 31337])
    assert done.tasks == (first, second) and done.left == {"not offered any more": 1}
    assert done.text == "2 tasks approved as batch 1; 1 left: not offered any more."
    (made,) = annotations(place, first)
    wanted = regions_of(place.settings, place.store, 1, place.store.versions.active(1), [first], 0.5)[first]
    assert [r["value"] for r in made["result"]] == [r["value"] for r in wanted]
    assert {(r["origin"], *r["meta"]["text"]) for r in made["result"]} == {("prediction", "approved in bulk, batch 1")}
    assert made["completed_by"] == 7, "the backend's own user"
    assert place.store.ledger.new_count(1) == 2 and first not in offer(place.settings, place.store, 1, MEASURED).tasks
    (batch,) = place.store.approvals.batches(1)
    assert (batch.tasks, batch.left, batch.annotator, batch.undone_at) == (2, 2, "", None)
    result = undo(place.store, place.client, 1, done.batch_id)
    assert (result.deleted, result.changed) == (2, 0) and annotations(place, first) == annotations(place, second) == []
    assert place.store.ledger.new_count(1) == 0 and place.store.approvals.batches(1)[0].undone_at is not None
    assert first in offer(place.settings, place.store, 1, MEASURED).tasks
    assert undo(place.store, place.client, 1, done.batch_id).deleted == 0, "twice is harmless"


def test_it_is_done_in_a_persons_name_where_one_is_named(place):
    first = next(iter(offer(place.settings, place.store, 1, MEASURED).tasks))
    approved(place, [first], annotator="ann@Example.com")
    assert annotations(place, first)[0]["completed_by"] == 8
    with pytest.raises(StateError, match=r"email of somebody in Label Studio, got 'nobody@example\.com'"):
        approved(place, list(offer(place.settings, place.store, 1, MEASURED).tasks)[:1], annotator="nobody@example.com")
    assert len(place.store.approvals.batches(1)) == 1


def test_what_people_changed_since_stays_theirs(place):
    first, second, *_ = offer(place.settings, place.store, 1, MEASURED).tasks
    done = approved(place, [first, second])
    annotations(place, first)[0]["result"][0]["value"]["x"] += 3.0
    result = undo(place.store, place.client, 1, done.batch_id)
    assert (result.deleted, result.changed) == (1, 1) and len(annotations(place, first)) == 1
    assert place.store.approvals.annotations(1) == {}, "a person's from now on"


@pytest.mark.parametrize("value", ["abc", [1], {"a": 1}])
def test_what_a_tool_wrote_over_an_approved_box_stays_too(place, value):
    """Label Studio stores annotations of other tools unchecked: undoing ended in an internal error."""
    first, *_ = offer(place.settings, place.store, 1, MEASURED).tasks
    done = approved(place, [first])
    annotations(place, first)[0]["result"][0]["value"]["x"] = value
    result = undo(place.store, place.client, 1, done.batch_id)
    assert (result.deleted, result.changed) == (0, 1) and len(annotations(place, first)) == 1


def test_labelled_deleted_or_approved_meanwhile_is_left(place):
    one, two, three, four, *_ = offer(place.settings, place.store, 1, MEASURED).tasks
    place.label_studio.tasks[one]["annotations"] = [{"id": 1, "was_cancelled": False, "result": []}]
    del place.label_studio.tasks[two]
    place.store.approvals.claim(1, place.store.approvals.begin(1, "v", 0.5, ""), three, "x")
    done = approved(place, [one, two, three, four])
    assert done.tasks == (four,)
    assert done.left == {"labelled meanwhile": 1, "deleted meanwhile": 1, "approved by somebody else": 1}
    assert len(annotations(place, one)) == 1 and annotations(place, three) == []


def test_the_boxes_of_a_version_that_is_no_longer_in_force_are_refused(place):
    first = next(iter(offer(place.settings, place.store, 1, MEASURED).tasks))
    old = place.store.versions.active(1).version
    place.round()
    with pytest.raises(StateError, match="another one was published"):
        approve(place.settings, place.store, place.client, 1, old, MEASURED, [first])
    assert annotations(place, first) == []


@pytest.mark.parametrize("step", ["importing", "imported", "activating"])
def test_approving_while_a_round_publishes_changes_neither(place, step):
    """In each state of publishing, in the middle of the round's own process."""
    first, second, *_ = offer(place.settings, place.store, 1, MEASURED).tasks
    done = []

    def at_step(request):
        path = request.url.path
        where = {"importing": "/import/predictions", "imported": "/api/projects/1/", "activating": "/model-versions"}
        if not done and request.method != "DELETE" and path.endswith(where[step]):
            done.append(None)
            done[0] = approved(place, [first, second])

    place.label_studio.fault = at_step
    record = place.round()
    place.label_studio.fault = lambda request: None
    assert record.state == "done" and done[0].tasks == (first, second)
    assert [len(annotations(place, i)) for i in (first, second)] == [1, 1]
    assert place.label_studio.counts()[place.store.versions.active(1).version] == 30
    assert place.store.ledger.new_count(1) == 2, "no round has used them"


def test_an_answer_that_never_came_leaves_no_second_annotation_and_can_be_undone(place):
    first, second, *_ = offer(place.settings, place.store, 1, MEASURED).tasks

    def lost(request, response):
        if request.method == "POST" and request.url.path == f"/api/tasks/{second}/annotations/":
            raise httpx.ReadTimeout("lost", request=request)
        return response

    place.label_studio.after = lost
    with pytest.raises(LabelStudioUnavailable):
        approved(place, [first, second])
    place.label_studio.after = lambda request, response: response
    assert len(annotations(place, second)) == 1
    assert approved(place, [second]).left == {"approved by somebody else": 1}
    assert undo(place.store, place.client, 1, 1).deleted == 2
    assert annotations(place, first) == annotations(place, second) == []


def test_a_claim_whose_annotation_never_came_is_taken_over(place, monkeypatch):
    from datetime import timedelta

    from ppal_backend.store import approvals, now

    first = next(iter(offer(place.settings, place.store, 1, MEASURED).tasks))
    place.store.approvals.claim(1, place.store.approvals.begin(1, "v", 0.5, ""), first, "x")
    monkeypatch.setattr(approvals, "now", lambda: now() + timedelta(seconds=CLAIM_S + 1))
    assert approved(place, [first]).tasks == (first,)


@pytest.mark.parametrize("tasks", [[], list(range(1, 62))])
def test_none_and_too_many_at_once_are_refused(place, tasks):
    with pytest.raises(StateError, match="expected 1 to 60 tasks"):
        approved(place, tasks)


def test_a_training_counts_them_apart_and_never_measures_on_them(place):
    tasks = list(offer(place.settings, place.store, 1, MEASURED).tasks)[:3]
    approved(place, tasks)

    class Labelled(type(place.world)):
        def prepare(self, folder, on_progress):
            from ppal_backend.datasets.coco import CocoAnnotation, CocoImage

            data = super().prepare(folder, on_progress)
            mine = [e for e in data.pool if e.image_id in tasks]
            images = [*data.labelled.images, *(CocoImage(e.image_id, e.path, e.width, e.height) for e in mine)]
            rows = [*data.labelled.annotations]
            rows += [CocoAnnotation(len(rows) + k, e.image_id, 1, (1.0, 1.0, 9.0, 9.0)) for k, e in enumerate(mine, 1)]
            labelled = replace(data.labelled, images=tuple(images), annotations=tuple(rows))
            return replace(data, labelled=labelled, pool=[e for e in data.pool if e.image_id not in tasks])

    place.world = Labelled()
    place.store.projects.connect(1, "1.1", place.label_studio.project["label_config"], "http://ls.test:8080",
                                 {"holdout_fraction": 0.5})  # fmt: skip
    place.round()
    from ppal_backend.rounds.folder import RoundFolder

    assert RoundFolder(place.folder(2)).facts("dataset")["approved_images"] == 3
    sides = place.store.sides.of_project(1)
    assert {sides[i] for i in tasks} == {TRAINING} and EVALUATION in sides.values()
