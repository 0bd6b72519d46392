"""The loop on a real Label Studio: what is annotated comes back as a queue with pre-annotations."""

import time
from collections import Counter

import psutil
import pytest

from ppal_backend.rounds.folder import Rounds
from ppal_backend.settings import load_settings
from tests.e2e.conftest import BUDGET, IMAGES

pytestmark = pytest.mark.e2e
ROUND_TIMEOUT_S = 240


def predictions_of(label_studio, project_id, version):
    rows = label_studio.session.get("/api/predictions", params={"project": project_id})
    return sorted((p for p in rows if p["model_version"] == version), key=lambda p: p["score"])


def project_of(label_studio, project_id):
    return label_studio.session.get(f"/api/projects/{project_id}/")


def round_folder(backend, project_id, number):
    return Rounds(load_settings(MODEL_DIR=backend.model_dir)).path(project_id, number)


def wait_for_version(label_studio, backend, project_id, prefix):
    def published():
        failed = [r for r in backend.store.rounds.of_project(project_id) if r.state == "failed"]
        assert not failed, failed[0].error
        return str(project_of(label_studio, project_id)["model_version"] or "").startswith(prefix)

    backend.wait_until(published, ROUND_TIMEOUT_S, f"version {prefix} of project {project_id}")
    return project_of(label_studio, project_id)["model_version"]


def assert_whole_queue(label_studio, project_id, version, labelled):
    """Every unlabelled task has exactly one prediction of the version, its place as the score: 1e-10, 2e-10, …"""
    stored = predictions_of(label_studio, project_id, version)
    per_task = Counter(p["task"] for p in stored)
    assert set(per_task.values()) == {1}, "a task has more than one prediction of the version"
    assert len(per_task) == IMAGES - labelled
    assert [p["score"] for p in stored] == [position / 1e10 for position in range(1, len(stored) + 1)]
    return stored


def test_annotating_the_budget_brings_a_ranked_and_pre_annotated_queue(label_studio, backend, make_project):
    project_id, annotator = make_project("loop")
    backend.connect(label_studio.session, project_id)
    first = wait_for_version(label_studio, backend, project_id, "ppal-r1-")
    assert project_of(label_studio, project_id)["sampling"] == "Uncertainty sampling"
    start = [p["task"] for p in assert_whole_queue(label_studio, project_id, first, labelled=0)]
    assert start != sorted(start), "before the first model the order should be random"

    assert annotator.label(BUDGET) == start[:BUDGET]

    version = wait_for_version(label_studio, backend, project_id, "ppal-r2-")
    ranked = assert_whole_queue(label_studio, project_id, version, labelled=BUDGET)
    served = annotator.label(10)
    assert served == [p["task"] for p in ranked[:10]]
    by_task = {p["task"]: p for p in ranked}
    for task in annotator.served[-10:]:
        shown = [p for p in task.predictions if p["model_version"] == version]
        assert len(shown) == 1 and shown[0]["result"] == by_task[task.task_id]["result"]
    assert sum(bool(p["result"]) for p in ranked) > len(ranked) / 2, "most images hold objects, few boxes came"
    labels = {r["value"]["rectanglelabels"][0] for p in ranked for r in p["result"]}
    assert labels <= set(project_of(label_studio, project_id)["parsed_label_config"]["label"]["labels"])


def kill_worker_in_step(backend, project_id, step):
    """Kill -9 the worker and its round process once the round has reached a step; the killed processes."""

    def reached():
        running = backend.store.rounds.running(project_id)
        if running is None or running.step != step or running.number == 1:
            return False
        return step != "train" or running.progress.get("done", 0) >= 5  # in the middle of it, not at its start

    end = time.monotonic() + ROUND_TIMEOUT_S
    while not reached():
        assert time.monotonic() < end, f"the round never reached {step}"
        time.sleep(0.01)
    victims = backend.find("ppal_backend.cli", "worker") + backend.find("ppal_backend.worker.round_process")
    for process in victims:
        process.kill()
    psutil.wait_procs(victims, timeout=10)
    return victims


@pytest.mark.parametrize("step", ["train", "publish"])
def test_a_killed_worker_loses_nothing(label_studio, backend, make_project, step):
    project_id, annotator = make_project(f"kill in {step}")
    backend.connect(label_studio.session, project_id)
    wait_for_version(label_studio, backend, project_id, "ppal-r1-")
    annotator.label(BUDGET)
    assert len(kill_worker_in_step(backend, project_id, step)) >= 2
    annotator.label(2)  # events that come while nobody works
    backend.wait_for_round(project_id, 2, ROUND_TIMEOUT_S)
    version = project_of(label_studio, project_id)["model_version"]
    assert version.startswith("ppal-r2-")
    stored = predictions_of(label_studio, project_id, version)
    assert set(Counter(p["task"] for p in stored).values()) == {1} and len(stored) == IMAGES - BUDGET
    assert backend.store.rounds.of_project(project_id)[1].attempts >= 2
    backend.wait_until(lambda: backend.store.ledger.new_count(project_id) == 2, 30, "the two later annotations")


def test_two_projects_each_get_their_own_classes_versions_and_queue(label_studio, backend, make_project, truth):
    halves = {"first": truth.labels[:8], "second": truth.labels[8:14]}
    projects = {title: make_project(title, labels) for title, labels in halves.items()}
    for project_id, _ in projects.values():
        backend.connect(label_studio.session, project_id)
    for project_id, _ in projects.values():
        wait_for_version(label_studio, backend, project_id, "ppal-r1-")
    for _, annotator in projects.values():
        annotator.label(BUDGET)
    versions = {}
    for title, (project_id, annotator) in projects.items():
        versions[title] = wait_for_version(label_studio, backend, project_id, "ppal-r2-")
        ranked = assert_whole_queue(label_studio, project_id, versions[title], labelled=BUDGET)
        used = {r["value"]["rectanglelabels"][0] for p in ranked for r in p["result"]}
        assert used <= set(halves[title])
        assert annotator.label(3) == [p["task"] for p in ranked[:3]]
        assert backend.store.versions.active(project_id).labels == tuple(halves[title])
    assert versions["first"] != versions["second"]


def test_a_wrong_extra_parameter_is_explained_where_the_user_connects(label_studio, backend, make_project):
    project_id, _ = make_project("wrong parameter")
    with pytest.raises(Exception, match="bugdet"):
        backend.connect(label_studio.session, project_id, '{"bugdet": 10}')
