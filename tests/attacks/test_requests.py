"""Requests that nobody honest sends."""

import io
import json
import pickle
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from tests.service.conftest import CONFIG, annotation_payload, predict_payload, setup_payload, task

pytestmark = pytest.mark.attacks
ROUTES = ["/setup", "/predict", "/webhook"]


def send(client, path, body, **options):
    return client.post(path, data=body, content_type="application/json", **options)


def refused(answer, *statuses):
    assert answer.status_code in statuses, answer.text
    assert set(answer.json) == {"error"}
    assert "Traceback" not in answer.text and "secret-key-1" not in answer.text
    return answer


@pytest.mark.parametrize("path", ROUTES)
def test_oversized_body(make_app, path, store):
    client = make_app(max_request_mib=1).test_client()
    body = b'{"x": "' + b"a" * 2**20 + b'"}'
    assert "PPAL_MAX_REQUEST_MIB" in refused(send(client, path, body), 413).json["error"]
    chunked = {"wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    answer = client.post(path, content_type="application/json", environ_overrides=chunked)
    refused(answer, 413)
    assert store.projects.all() == []


def test_an_oversized_body_is_not_read_before_the_caller_is_known(make_app):
    client = make_app(basic_auth_user="ls", basic_auth_pass=SecretStr("long password")).test_client()

    class Unread(io.BytesIO):
        def read(self, *args):
            raise AssertionError("the body was read")

        readline = readinto = read

    options = {"wsgi.input": Unread(), "CONTENT_LENGTH": str(2**40)}
    refused(client.post("/predict", content_type="application/json", environ_overrides=options), 401)


MALFORMED = {
    "cut off": b'{"action": "ANNOTATION_CREATED", "annota',
    "nothing": b"",
    "not UTF-8": b'{"action": "\xff\xfe"}',
    "UTF-16 with a stray byte": '{"action": "x"}'.encode("utf-16") + b"\x00",
    "deep": b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"x": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}",
    "huge number": b'{"project": 1' + b"0" * 10_000 + b"}",
    "huge exponent": b'{"project": {"id": 1e999999999}, "action": "START_TRAINING"}',
    "NaN": b'{"action": "START_TRAINING", "project": {"id": 7}, "tasks": [], "schema": "<View/>", "x": NaN}',
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "YAML": b"action: x",
    "pickle": pickle.dumps({"action": "x"}),
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_json(client, connected, store, path, body):
    answer = send(client, path, body)
    if path == "/webhook" and b"1e999" in body:  # JSON with an action, so it may be an event of Label Studio's
        assert (answer.status_code, answer.json["status"]) == (200, "ignored")
    else:
        refused(answer, 400)
    assert store.events.counts() == {}


def test_a_key_given_twice_is_read_once_and_the_same_way_everywhere(client, connected, store):
    """The last one counts, for the check of the token as for the event."""
    answer = send(client, "/webhook", b'{"action": "START_TRAINING", "project": {"id": 8}, "project": {"id": 7}}')
    assert answer.status_code == 201
    assert len(store.events.pending(7)) == 1


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_form_of_another_site_is_not_read(client, connected, store, kind):
    """A browser sends these without asking this server first."""
    answer = client.post("/webhook", data=json.dumps({"action": "START_TRAINING", "project": {"id": 7}}),
                         content_type=kind)  # fmt: skip
    refused(answer, 415)
    assert store.events.counts() == {}


INJECTIONS = ["a\r\nSet-Cookie: x=1", "a\nX-Evil: 1", "a\x00b", "a\u2028b", "a\x85X-Evil: 1", "é\r\n\r\n<script>"]


@pytest.mark.parametrize("evil", INJECTIONS)
def test_header_injection_into_answers(client, connected, evil):
    """The error text becomes the status line's reason; it stays one line of printable ASCII."""
    bodies = [
        ("/setup", setup_payload(extra_params={evil: 1})),
        ("/setup", setup_payload(extra_params={"strategy": evil})),
        ("/setup", setup_payload(schema=f"<View>{evil}")),
        ("/webhook", {"action": evil}),
    ]
    for path, body in bodies:
        answer = client.post(path, json=body)
        assert answer.status.isprintable() and answer.status.isascii()
        assert "X-Evil" not in answer.headers and "Set-Cookie" not in answer.headers
        assert answer.content_type == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    answer = client.get("/" + quote(evil))
    assert (answer.status_code, answer.content_type) == (404, "application/json")


def test_header_injection_into_logs(client, connected, caplog):
    caplog.set_level("INFO")
    for evil in INJECTIONS:
        client.post("/setup", json=setup_payload(extra_params={"strategy": evil}))
        client.post("/webhook", json={"action": "ANNOTATION_CREATED", "project": evil})
    assert caplog.records
    for record in caplog.records:
        assert "\n" not in record.getMessage() and "\r" not in record.getMessage()


NAMES = ["/etc/passwd", "../../model.pth", "..", "http://evil.test/x.py", "retinanet_tiny/../x", "retinanet_tiny.py",
         "retinanet_tiny\x00", "~/x", "C:\\x", "mmdet::x/y.py", "file:///tmp/x.py", "", "a" * 300]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_extra_parameter_that_names_a_path_as_detector(client, store, name, monkeypatch):
    monkeypatch.setattr("builtins.open", _no_file_of(name))
    for params in ({"detector": name}, json.dumps({"detector": name})):
        answer = refused(client.post("/setup", json=setup_payload(extra_params=params)), 400)
        assert "detector" in answer.json["error"]
    assert store.projects.all() == []


@pytest.mark.parametrize("key", ["config", "checkpoint", "model_path", "weights", "init_weights", "custom_imports"])
def test_an_extra_parameter_that_names_a_file(client, store, key):
    refused(client.post("/setup", json=setup_payload(extra_params={key: "/tmp/evil.pth"})), 400)
    assert store.projects.all() == []


@pytest.mark.parametrize("attribute", ["model", "model_path", "checkpoint", "detector", "config", "smart", "src"])
def test_a_label_config_that_names_a_model_path(client, store, predictor, attribute):
    """It is a labeling config like any other: the detector stays the operator's."""
    config = CONFIG.replace("<RectangleLabels ", f'<RectangleLabels {attribute}="/tmp/evil.pth" ')
    config = config.replace("<Label ", f'<Label {attribute}="http://evil.test/x.py" ', 1)
    assert client.post("/setup", json=setup_payload(schema=config)).status_code == 200
    from tests.service.conftest import activate

    activate(store)
    client.post("/predict", json=predict_payload(task(5), label_config=config))
    assert store.projects.get(7).options == {}
    ((model, _, _),) = predictor.calls
    assert (model.detector, "evil" in model.checkpoint) == ("retinanet_tiny", False)


BOMBS = {
    "billion laughs": "<!DOCTYPE l ["
    + '<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
    + "]><View>&j;</View>",
    "quadratic": f'<!DOCTYPE l [<!ENTITY a "{"a" * 50_000}">]><View>{"&a;" * 10_000}</View>',
    "file": '<!DOCTYPE l [<!ENTITY x SYSTEM "file:///etc/passwd">]><View><Header value="&x;"/></View>',
    "network": '<!DOCTYPE l SYSTEM "http://127.0.0.1:9/x.dtd"><View/>',
    "parameter entity": '<!DOCTYPE l [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]><View/>',
}


@pytest.mark.parametrize("xml", BOMBS.values(), ids=BOMBS.keys())
def test_xml_bombs(client, store, xml):
    answer = refused(client.post("/setup", json=setup_payload(schema=xml)), 400)
    assert "DOCTYPE" in answer.json["error"] and "root:" not in answer.text
    assert store.projects.all() == []


@pytest.mark.parametrize("path", ["//health/../metrics", "/health/../metrics", "/health%2f..%2fmetrics", "/HEALTH",
                                  "/health/", "/health;x", "/health?x=/metrics#", "/./metrics"])  # fmt: skip
def test_nothing_gets_past_the_guard_under_another_spelling(make_app, path):
    client = make_app(basic_auth_user="ls", basic_auth_pass=SecretStr("long password")).test_client()
    answer = client.get(path)
    assert answer.status_code == 401 or answer.json == {"status": "UP", "model_class": "PPALBackend"}
    assert "ppal_" not in answer.text


def test_a_method_override_does_not_get_past_the_guard(make_app, store):
    client = make_app(basic_auth_user="ls", basic_auth_pass=SecretStr("long password")).test_client()
    for headers in ({"X-HTTP-Method-Override": "GET"}, {"X-Original-URL": "/health"}, {"X-Forwarded-For": "127.0.0.1"}):
        answer = client.post("/webhook", json=annotation_payload(), headers=headers)
        assert (answer.status_code, answer.json["status"]) == (200, "ignored")
        refused(client.post("/setup", json=setup_payload(), headers=headers), 401)
    assert store.events.counts() == {}


def test_guessing_cannot_be_spread_over_invented_addresses(make_app):
    """X-Forwarded-For is the caller's own word."""
    client = make_app(basic_auth_user="ls", basic_auth_pass=SecretStr("long password")).test_client()
    statuses = [
        client.get("/versions", auth=("ls", f"guess {n}"), headers={"X-Forwarded-For": f"10.0.0.{n}"}).status_code
        for n in range(12)
    ]
    assert statuses == [401] * 10 + [429] * 2


def _no_file_of(name):
    real = open

    def checked(file, *args, **kwargs):
        assert not name or str(file) != name, f"opened {file}"
        return real(file, *args, **kwargs)

    return checked
