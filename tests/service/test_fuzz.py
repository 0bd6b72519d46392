"""Any JSON at all, and near misses of real payloads: never a 5xx, never a broken promise."""

import copy
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.conftest import annotation_payload, predict_payload, setup_payload, task

QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
TEXT = st.text(st.characters(), max_size=20) | st.sampled_from(
    [
        "7",
        "7.1795336563",
        "\ud800",
        "\x00",
        "ANNOTATION_CREATED",
        "http://localhost",
        "<View/>",
        '{"budget": 5}',
        "{",
        "١",
    ]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([0, 7, -1, 2**31, 2**63, 10**40]) | st.floats() | TEXT
)
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)
ANNOTATIONS = {**annotation_payload(), "action": "ANNOTATIONS_CREATED", "annotation": [{"id": 1, "task": 2}]}
TEMPLATES = [
    ("/webhook", annotation_payload()),
    ("/webhook", ANNOTATIONS),
    ("/webhook", {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 4}], "project": {"id": 7}}),
    ("/webhook", {"action": "TASKS_CREATED", "tasks": [{"id": 4}], "project": {"id": 7}}),
    ("/webhook", {"action": "PROJECT_UPDATED", "project": {"id": 7, "label_config": "<View/>"}}),
    ("/webhook", {"action": "START_TRAINING", "project": {"id": 7}}),
    ("/predict", predict_payload(task(5), task(6))),
    ("/setup", setup_payload(extra_params={"budget": 5, "detector": "retinanet_tiny", "delta": 4.0})),
    ("/setup", setup_payload(extra_params='{"budget": 5}')),
]


def paths(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


@st.composite
def near_misses(draw):
    """A real payload with one or two of its parts replaced by anything, or dropped."""
    path, payload = draw(st.sampled_from(TEMPLATES))
    payload = copy.deepcopy(payload)
    for _ in range(draw(st.integers(1, 2))):
        where = draw(st.sampled_from(list(paths(payload))[1:] or [()]))
        if not where:
            break
        holder = payload
        for key in where[:-1]:
            holder = holder[key]
        if draw(st.booleans()):
            holder[where[-1]] = draw(ANY_JSON)
        else:
            del holder[where[-1]]
    return path, payload


def check(client, path, body):
    answer = client.post(path, data=body, content_type="application/json")
    assert answer.status_code < 500, (answer.status_code, body, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json) == {"error"}
        assert "Traceback" not in answer.text
    return answer


@QUICK
@given(path=st.sampled_from(["/webhook", "/predict", "/setup"]), value=ANY_JSON)
def test_any_json(client, connected, path, value):
    check(client, path, json.dumps(value))


@QUICK
@given(path=st.sampled_from(["/webhook", "/predict", "/setup"]), body=st.binary(max_size=60))
def test_any_bytes(client, connected, path, body):
    assert check(client, path, body).status_code >= 400


@settings(QUICK, max_examples=600)
@given(case=near_misses())
def test_near_misses(client, connected, predictor, store, case):
    path, payload = case
    if not store.versions.names():
        from tests.service.conftest import activate

        activate(store)
    answer = check(client, path, json.dumps(payload))
    if path == "/predict" and answer.status_code == 200:
        assert len(answer.json["results"]) == len(payload["tasks"])
        for entry in answer.json["results"]:
            assert isinstance(entry["result"], list) and isinstance(entry["model_version"], str)
            assert 0.0 <= entry["score"] <= 1.0
    if path == "/setup" and answer.status_code == 200:
        assert isinstance(answer.json["model_version"], str)


@QUICK
@given(text=st.text(st.characters(codec="latin-1"), max_size=60))
def test_any_authorization_header(make_app, text):
    from pydantic import SecretStr

    app = make_app(basic_auth_user="a", basic_auth_pass=SecretStr("b"))
    header = "".join(c for c in text if c.isprintable())
    for prefix in ("", "Basic ", "Bearer "):
        headers = {"Authorization": prefix + header}
        answer = app.test_client().post("/webhook", json=annotation_payload(), headers=headers)
        assert (answer.status_code, answer.json["status"]) == (200, "ignored")
        assert app.test_client().get("/versions", headers=headers).status_code in (401, 429)
