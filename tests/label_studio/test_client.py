"""The client over a fake transport: paging, retries, error texts, export, webhooks."""

from __future__ import annotations

import json
import tracemalloc
from datetime import UTC, datetime

import httpx
import pytest

from ppal_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio import client as client_module
from ppal_backend.label_studio.client import WEBHOOK_ACTIONS, LabelStudioClient, read_export
from tests.label_studio.fake import LEGACY, FakeLabelStudio


def annotation(number: int, cancelled: bool = False) -> dict:
    time = f"2026-01-02T00:00:{number:02d}.000000Z"
    return {"id": number, "created_at": time, "updated_at": time, "was_cancelled": cancelled}


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(client_module, "PAGE_SIZE", 3)


def test_reads_are_repeated_while_it_is_down_with_growing_waits():
    fake, waits, left = FakeLabelStudio(), [], [3]

    def fault(request):
        left[0] -= 1
        return httpx.Response(503) if left[0] >= 0 else None

    fake.fault = fault
    assert fake.client(sleep=waits.append).project(1)["id"] == 1
    assert len(waits) == 3
    assert waits[0] < waits[1] < waits[2]


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (httpx.Response(500), LabelStudioUnavailable, "500"),
        (httpx.Response(401, json={"detail": "Invalid token."}), LabelStudioAuthError, "Invalid token"),
        (httpx.Response(403, json={"detail": "no"}), LabelStudioAuthError, "403"),
        (httpx.Response(400, json={"detail": "bad", "validation_errors": {"a": ["b"]}}), LabelStudioError, "a: b"),
        (httpx.Response(200, text="<html>hello"), LabelStudioError, "expected JSON"),
        (httpx.Response(302, headers={"location": "https://ls.test/x?secret=1"}), LabelStudioError, "redirect"),
    ],
)
def test_failures_have_their_own_errors(answer, kind, text):
    fake = FakeLabelStudio()
    fake.fault = lambda request: answer
    with pytest.raises(kind, match=text) as caught:
        fake.client().project(1)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError])
def test_network_failures_are_unavailable(error):
    fake = FakeLabelStudio()

    def fault(request):
        raise error("x", request=request)

    fake.fault = fault
    with pytest.raises(LabelStudioUnavailable):
        fake.client(tries=2).version()
    with pytest.raises(LabelStudioUnavailable):
        fake.client(tries=2).whoami()
    assert len(fake.requests) == 4


def test_import_is_sent_once_with_a_long_limit():
    fake = FakeLabelStudio()
    fake.fault = lambda request: httpx.Response(500)
    with pytest.raises(LabelStudioUnavailable):
        fake.client().import_predictions(1, b'[{"task": 1, "result": [], "score": 0.1, "model_version": "v"}]')
    assert len(fake.requests) == 1
    assert fake.requests[0].extensions["timeout"]["read"] >= 120


def test_sdk_calls_get_our_signature_not_the_sdks():
    fake = FakeLabelStudio()
    assert fake.client().whoami()["email"] == "a@example.com"
    assert fake.requests[0].headers["authorization"] == f"Token {LEGACY}"


def test_address_needs_a_scheme():
    with pytest.raises(LabelStudioError, match="http://"):
        LabelStudioClient("localhost:8080", LEGACY)


def test_unlabelled_tasks_keep_skipped_ones_and_page_by_id(small_pages):
    fake = FakeLabelStudio(tasks=8)
    fake.tasks[2]["annotations"] = [annotation(1)]
    fake.tasks[5]["annotations"] = [annotation(2, cancelled=True)]
    found = fake.client().unlabelled_tasks(1)
    first = next(found)
    fake.tasks[1]["annotations"] = [annotation(3)]
    del fake.tasks[3]
    rest = [task_id for task_id, _ in found]
    assert first == (1, {"image": "/data/upload/1/1.jpg"})
    assert rest == [3, 4, 5, 6, 7, 8], "a task annotated while paging must not push another out of sight"
    assert fake.requests[0].url.params["resolve_uri"] == "false"
    assert fake.requests[0].url.params["include"] == "id,data"


def test_task_ids_when_the_last_page_is_full(small_pages):
    assert list(FakeLabelStudio(tasks=6).client().task_ids(1)) == [1, 2, 3, 4, 5, 6]
    assert list(FakeLabelStudio(tasks=0).client().task_ids(1)) == []


def test_a_label_studio_that_gives_smaller_pages_than_asked_for_hides_no_task():
    """TASK_API_PAGE_SIZE_MAX cuts pages without a word: the first one passed for the whole project."""
    fake = FakeLabelStudio(tasks=8)
    fake.most_on_a_page = 3
    fake.tasks[2]["annotations"] = [annotation(1)]
    client = fake.client()
    assert list(client.task_ids(1)) == list(range(1, 9))
    assert [task_id for task_id, _ in client.unlabelled_tasks(1)] == [1, 3, 4, 5, 6, 7, 8]
    assert [stamp.id for stamp in client.tasks_updated_since(1, "2026-01-01T00:00:02.000000Z")] == list(range(2, 9))
    for task in fake.tasks.values():
        task["updated_at"] = "2026-01-01T00:00:00.000000Z"
    assert sorted(stamp.id for stamp in client.tasks_updated_since(1, None)) == list(range(1, 9))


@pytest.mark.parametrize("number", [1, 100, 101, 250])
def test_every_project_is_listed_however_many_there_are(number):
    """Label Studio gives at most 100 of them at a time: those beyond could never be connected from the dashboard."""
    fake = FakeLabelStudio(tasks=3)
    fake.others = [{"id": i, "title": f"P{i}", "task_number": i} for i in range(2, number + 1)]
    found = fake.client().projects()
    assert [row["id"] for row in found] == list(range(1, number + 1))
    assert found[-1] == {"id": number, "title": "" if number == 1 else f"P{number}", "tasks": max(number, 3)}


def test_updated_since_gives_annotation_stamps(small_pages):
    fake = FakeLabelStudio(tasks=7)
    fake.tasks[6]["annotations"] = [annotation(4), annotation(5, cancelled=True)]
    stamps = list(fake.client().tasks_updated_since(1, "2026-01-01T00:00:03.000000Z"))
    assert [stamp.id for stamp in stamps] == [3, 4, 5, 6, 7]
    assert [(a.id, a.was_cancelled) for a in stamps[3].annotations] == [(4, False), (5, True)]
    assert stamps[3].annotations[0].created_at == "2026-01-02T00:00:04.000000Z"
    moment = datetime(2026, 1, 1, 0, 0, 7, tzinfo=UTC)
    assert [stamp.id for stamp in fake.client().tasks_updated_since(1, moment)] == [7]
    with pytest.raises(ValueError, match="time zone"):
        list(fake.client().tasks_updated_since(1, datetime(2026, 1, 1)))


def test_updated_since_sees_a_task_that_moves_to_the_end_while_paging(small_pages):
    fake = FakeLabelStudio(tasks=7)
    found = fake.client().tasks_updated_since(1, None)
    seen = [next(found).id for _ in range(3)]
    fake.tasks[1]["updated_at"] = "2026-01-03T00:00:00.000000Z"
    seen += [stamp.id for stamp in found]
    assert seen == [1, 2, 3, 4, 5, 6, 7, 1]


def test_a_change_on_the_full_second_is_no_end_of_all_polls(small_pages):
    """Label Studio writes no fraction then, and takes no filter without one: it answered 500 to every poll from there
    on. On Windows a clock of a millisecond meets a full second once in a thousand changes."""
    fake = FakeLabelStudio(tasks=9)
    for i, task in fake.tasks.items():
        task["updated_at"] = "2026-01-01T00:00:05Z" if i > 2 else f"2026-01-01T00:00:0{i}.500000Z"
    fake.tasks[9]["updated_at"] = "2026-01-01T00:00:05.250000Z"
    client = fake.client(tries=1)
    stamps = list(client.tasks_updated_since(1, "2026-01-01T00:00:02Z"))
    assert sorted(stamp.id for stamp in stamps) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert max(stamp.updated_at for stamp in stamps) == stamps[-1].updated_at, "as texts they are in order too"
    tied = client.tasks_updated_since(1, stamps[-2].updated_at)
    assert sorted(stamp.id for stamp in tied) == [3, 4, 5, 6, 7, 8, 9]
    fake.tasks[9]["updated_at"] = "2026-01-01T09:00:06+09:00"
    assert [t["id"] for t in client.changed_tasks(1, client.last_change(1))] == [9]


def test_annotated_tasks_are_listed_and_counted_alike(small_pages):
    fake = FakeLabelStudio(tasks=8)
    for number in (1, 3, 4, 6, 8):
        fake.tasks[number]["annotations"] = [annotation(number)]
    fake.tasks[2]["annotations"] = [annotation(9, cancelled=True)]
    assert list(fake.client().annotated_task_ids(1)) == [1, 3, 4, 6, 8]
    asked = len(fake.requests)
    assert fake.client().annotated_task_count(1) == 5 and len(fake.requests) == asked + 1
    assert FakeLabelStudio(tasks=2).client().annotated_task_count(1) == 0


def test_updated_since_with_many_tasks_of_one_moment(small_pages):
    fake = FakeLabelStudio(tasks=8)
    for task in fake.tasks.values():
        task["updated_at"] = "2026-01-01T00:00:00.000000Z"
    assert sorted(stamp.id for stamp in fake.client().tasks_updated_since(1, None)) == list(range(1, 9))


@pytest.mark.parametrize("since", [None, "2026-02-01T00:00:00Z"])
def test_tasks_that_one_action_changed_all_come_once_whatever_their_order(small_pages, since):
    """Label Studio orders by the time alone, and PostgreSQL gives equal ones in another order with every page: of 4,000
    tasks that a bulk action had given one time, some came twice and others never."""
    fake = FakeLabelStudio(tasks=60)
    for i, task in fake.tasks.items():
        if i % 2:
            task["updated_at"] = "2026-02-01T00:00:00Z"
    fake.tasks[60]["updated_at"] = "2026-02-01T00:00:01Z"
    asked = list(fake.client().tasks_updated_since(1, since))
    changed = range(1, 61) if since is None else [*range(1, 61, 2), 60]
    assert sorted(stamp.id for stamp in asked) == list(changed)
    assert [stamp.updated_at for stamp in asked] == sorted(stamp.updated_at for stamp in asked)


def test_an_export_of_some_tasks_tells_of_their_annotations_as_the_changes_do():
    fake = FakeLabelStudio(tasks=5)
    fake.tasks[2]["annotations"] = [annotation(4), annotation(5, cancelled=True)]
    fake.tasks[4]["annotations"] = [annotation(6)]
    stamps = {stamp.id: stamp for stamp in fake.client().tasks_updated_since(1, None)}
    assert list(fake.client().exported_stamps(1, [1, 2])) == [stamps[2]]


def exported(client, folder):
    return read_export(client.download_export(1, folder / "export.json"))


def test_export_gives_annotated_tasks_one_by_one_with_floats(tmp_path):
    fake = FakeLabelStudio()
    fake.tasks[2]["annotations"] = [annotation(1) | {"result": [{"value": {"x": 1.25}}]}]
    fake.tasks[4]["annotations"] = [annotation(2, cancelled=True)]
    tasks = list(exported(fake.client(), tmp_path))
    assert [task["id"] for task in tasks] == [2, 4]
    value = tasks[0]["annotations"][0]["result"][0]["value"]["x"]
    assert (value, type(value)) == (1.25, float)
    assert list(exported(FakeLabelStudio().client(), tmp_path)) == []


def test_cut_off_export_is_fetched_again_and_leaves_the_old_file(tmp_path):
    fake, answers = FakeLabelStudio(), [b'[{"id": 1}, {"i', b'[{"id": 7}]']
    fake.fault = lambda request: httpx.Response(200, content=answers.pop(0))
    path = tmp_path / "export.json"
    assert [t["id"] for t in read_export(fake.client().download_export(1, path))] == [7]
    fake.fault = lambda request: httpx.Response(200, content=b'[{"id": 9}')
    with pytest.raises(LabelStudioUnavailable, match="cut-off"):
        fake.client().download_export(1, path)
    assert json.loads(path.read_text()) == [{"id": 7}]
    assert [p.name for p in tmp_path.iterdir()] == ["export.json"]


@pytest.mark.parametrize(("answer", "tries"), [(504, 1), (524, 1), (httpx.ReadTimeout("slow"), 1), (502, 4), (500, 4)])
def test_an_export_that_takes_too_long_as_a_whole_is_read_in_parts(tmp_path, monkeypatch, answer, tries):
    """Proxies end it after a minute or five: a large project could never be trained on."""
    monkeypatch.setattr(client_module, "EXPORT_AT_ONCE", 2)
    fake, whole = FakeLabelStudio(tasks=9), []
    for number in (1, 3, 4, 6, 8):
        fake.tasks[number]["annotations"] = [annotation(number) | {"result": [{"value": {"x": 1.25}}]}]
    fake.tasks[7]["annotations"] = [annotation(17, cancelled=True)]
    wanted = list(exported(fake.client(), tmp_path))
    assert [task["id"] for task in wanted] == [1, 3, 4, 6, 7, 8]

    def fault(request):
        if not request.url.path.endswith("/export") or request.url.params.get_list("ids[]"):
            return None
        whole.append(request)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer, html="<html>gateway</html>")

    fake.fault = fault
    assert list(exported(fake.client(), tmp_path)) == wanted
    assert len(whole) == tries, "asking for the same again would take as long, and Label Studio works on all of them"
    assert [p.name for p in tmp_path.iterdir()] == ["export.json"]


def test_an_export_that_fails_after_a_long_time_is_not_asked_for_as_a_whole_again(tmp_path, monkeypatch):
    """Label Studio's Docker image kills a request after two minutes, which reads as 502."""
    monkeypatch.setattr(client_module, "EXPORT_PATIENCE_S", -1.0)
    fake, whole = FakeLabelStudio(tasks=3), []
    fake.tasks[2]["annotations"] = [annotation(2)]

    def fault(request):
        if not request.url.path.endswith("/export") or request.url.params.get_list("ids[]"):
            return None
        whole.append(request)
        return httpx.Response(502)

    fake.fault = fault
    assert [task["id"] for task in exported(fake.client(), tmp_path)] == [2] and len(whole) == 1


def test_an_export_of_a_label_studio_that_is_down_keeps_the_old_file(tmp_path):
    fake, path = FakeLabelStudio(), tmp_path / "export.json"
    path.write_text("[]")
    fake.fault = lambda request: httpx.Response(504)
    with pytest.raises(LabelStudioUnavailable, match=r"answered 504 to GET /api/projects/1/export"):
        fake.client().download_export(1, path)
    assert path.read_text() == "[]" and [p.name for p in tmp_path.iterdir()] == ["export.json"]


def test_broken_export_file_is_named(tmp_path):
    path = tmp_path / "annotated.json"
    path.write_text('[{"id": 1}, {]')
    with pytest.raises(LabelStudioError, match=r"annotated\.json"):
        list(read_export(path))


def test_page_of_the_web_site_is_no_export(tmp_path):
    fake = FakeLabelStudio()
    fake.fault = lambda request: httpx.Response(200, html="<html>login</html>")
    with pytest.raises(LabelStudioError, match="web page"):
        fake.client().download_export(1, tmp_path / "x.json")


def test_webhook_is_created_once_then_mended_with_its_actions():
    fake = FakeLabelStudio()
    client = fake.client()
    made = client.ensure_webhook(1, "http://ppal.local:9090/webhook", {"Authorization": "Bearer s"})
    assert made["headers"] == {"Authorization": "Bearer s"}
    assert sorted(made["actions"]) == sorted(WEBHOOK_ACTIONS)
    client.ensure_webhook(1, "http://ppal.local:9090/webhook/")
    assert [r.method for r in fake.requests].count("POST") == 1
    assert [r.method for r in fake.requests].count("PATCH") == 0
    fake.hooks[0]["actions"] = ["ANNOTATION_CREATED", "LABEL_LINK_CREATED"]
    client.ensure_webhook(1, "http://ppal.local:9090/webhook", {"Authorization": "Bearer new"})
    assert fake.hooks[0]["headers"] == {"Authorization": "Bearer new"}
    assert set(fake.hooks[0]["actions"]) == {*WEBHOOK_ACTIONS, "LABEL_LINK_CREATED"}


def test_webhook_for_all_actions_keeps_that_and_gets_headers():
    fake = FakeLabelStudio()
    fake.hooks = [
        {"id": 1, "url": "http://b.local/webhook", "project": 1, "headers": {}, "actions": [], "is_active": True}
        | {"send_payload": True, "send_for_all_actions": True}
    ]
    client = fake.client()
    client.ensure_webhook(1, "http://b.local/webhook")
    assert "PATCH" not in [r.method for r in fake.requests]
    client.ensure_webhook(1, "http://b.local/webhook", {"A": "b"})
    assert fake.hooks[0]["headers"] == {"A": "b"}
    assert fake.hooks[0]["send_for_all_actions"] is True


def test_webhooks_of_other_projects_are_not_ours():
    fake = FakeLabelStudio()
    fake.hooks = [{"id": 1, "url": "http://b.local/webhook", "project": 2, "headers": {}, "actions": []}]
    assert fake.client().webhooks(1) == []


def test_refused_webhook_address_is_an_error_with_the_reason():
    fake = FakeLabelStudio()
    fake.fault = lambda request: (
        httpx.Response(400, json={"detail": "Validation error", "validation_errors": {"url": ["Enter a valid URL."]}})
        if request.method == "POST"
        else None
    )
    with pytest.raises(LabelStudioError, match="Enter a valid URL"):
        fake.client().ensure_webhook(1, "http://backend:9090/webhook")


def test_a_large_export_is_never_held_in_memory(tmp_path):
    value = {"x": 1.5, "y": 2.5, "width": 3.5, "height": 4.5, "rectanglelabels": ["c1"]}
    region = {"value": value, "type": "rectanglelabels"}

    def content():
        for number in range(4000):
            task = {"id": number, "annotations": [{"id": number, "result": [region] * 10}]}
            yield (b"[" if number == 0 else b",") + json.dumps(task).encode()
        yield b"]"

    size = sum(len(chunk) for chunk in content())
    fake = FakeLabelStudio()
    fake.fault = lambda request: httpx.Response(200, content=content())
    client = fake.client()
    tracemalloc.start()
    try:
        count = sum(1 for _ in exported(client, tmp_path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 4000
    assert peak < size / 5, f"{peak} bytes of memory for an export of {size}"
