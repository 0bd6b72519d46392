"""Tokens: both kinds, renewal, and that no text ever holds one."""

from __future__ import annotations

import logging

import httpx
import pytest

from ppal_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.auth import TokenAuth, same_origin, token_claims
from ppal_backend.label_studio.client import LabelStudioClient
from tests.label_studio.fake import LEGACY, PAT, URL, FakeLabelStudio, jwt


def test_legacy_token_is_sent_as_it_is():
    fake = FakeLabelStudio()
    client = fake.client(LEGACY)
    assert client.token_kind == "legacy"
    assert client.project(1)["id"] == 1
    assert [r.headers["authorization"] for r in fake.requests] == [f"Token {LEGACY}"]


def test_personal_token_is_exchanged_once_and_never_sent_itself():
    fake = FakeLabelStudio()
    client = fake.client(PAT)
    client.project(1)
    client.project(1)
    assert client.token_kind == "pat"
    assert fake.paths() == ["/api/token/refresh/", "/api/projects/1/", "/api/projects/1/"]
    assert all(PAT not in r.headers.get("authorization", "") for r in fake.requests)


def test_access_token_is_renewed_before_it_ends_and_not_sooner():
    now = [0.0]
    fake = FakeLabelStudio()
    client = fake.client(PAT)
    client.transport.auth._clock = lambda: now[0]
    client.project(1)
    now[0] = 239.0
    client.project(1)
    assert len(fake.access) == 1
    now[0] = 241.0
    client.project(1)
    assert len(fake.access) == 2


def test_refused_access_token_is_renewed_once_and_the_call_repeated():
    fake = FakeLabelStudio()
    client = fake.client(PAT)
    client.project(1)
    fake.valid_access.clear()
    assert client.project(1)["id"] == 1
    assert len(fake.access) == 2


def test_a_refusal_that_lasts_is_an_error_and_no_endless_loop():
    fake = FakeLabelStudio()
    client = fake.client(PAT)
    client.project(1)
    fake.after = lambda request, response: (
        response if "refresh" in request.url.path else httpx.Response(401, json={"detail": "no"})
    )
    with pytest.raises(LabelStudioAuthError, match="Personal Access Token"):
        client.project(1)
    assert len(fake.requests) == 5


@pytest.mark.parametrize("key", ["nonsense", jwt("refresh", tag="other")])
def test_wrong_token_says_what_to_do_and_hides_it(key, caplog):
    caplog.set_level(logging.DEBUG)
    client = FakeLabelStudio().client(key)
    with pytest.raises(LabelStudioAuthError) as caught:
        client.project(1)
    assert "Personal Access Token" in str(caught.value)
    for text in (str(caught.value), repr(client), repr(client.transport), repr(client.transport.auth), caplog.text):
        assert key not in text


def test_token_echoed_by_the_server_is_cut_out():
    fake = FakeLabelStudio()

    def echo(request, response):
        return httpx.Response(401, json={"detail": f"bad {request.headers['authorization']}"})

    fake.after = echo
    with pytest.raises(LabelStudioAuthError) as caught:
        fake.client(LEGACY).project(1)
    assert LEGACY not in str(caught.value)
    assert "[token]" in str(caught.value)


@pytest.mark.parametrize("key", ["", "   ", jwt("access"), "two words", "tokén"])
def test_unusable_keys_are_refused_at_once(key):
    with pytest.raises(LabelStudioAuthError, match="expected"):
        TokenAuth(URL, key)


def test_token_service_down_is_unavailable_not_refused():
    fake = FakeLabelStudio()
    fake.fault = lambda request: httpx.Response(502) if "refresh" in request.url.path else None
    with pytest.raises(LabelStudioUnavailable):
        fake.client(PAT).project(1)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (httpx.Response(404, html="<h1>Not found</h1>"), r"got status 404 \(text/html\)"),
        (httpx.Response(301, headers={"location": "https://ls.test/login?next=x"}), "got a redirect to 'https://ls.test/login'"),
        (httpx.Response(302, headers={"location": "/user/login"}), "got a redirect to '/user/login'"),
        (httpx.Response(405), r"got status 405 \(no content type\)"),
        (httpx.Response(413, html="too large"), "got status 413"),
        (httpx.Response(200, html="<h1>Grafana</h1>"), r"got status 200 \(text/html\)"),
        (httpx.Response(401, html="<h1>Login</h1>"), r"got status 401 \(text/html\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", ["project", "whoami"])
def test_something_else_at_the_address_is_not_called_a_refused_token(answer, told, call):
    """It told people to make a new token, over and over."""
    fake = FakeLabelStudio()
    fake.fault = lambda request: answer if "refresh" in request.url.path else None
    client = fake.client(PAT)
    with pytest.raises(LabelStudioError, match=told) as caught:
        client.project(1) if call == "project" else client.whoami()
    assert not isinstance(caught.value, LabelStudioAuthError)
    assert "this is not Label Studio's address" in str(caught.value) and "set LABEL_STUDIO_URL" in str(caught.value)


def test_a_login_page_before_label_studio_is_not_called_a_refused_token():
    fake = FakeLabelStudio()
    fake.fault = lambda request: httpx.Response(401, html="<h1>Login</h1>")
    with pytest.raises(LabelStudioError, match="something before it asks for a login of its own") as caught:
        fake.client(LEGACY).project(1)
    assert not isinstance(caught.value, LabelStudioAuthError)


def test_a_self_signed_certificate_is_named_and_the_advice_works(self_signed, monkeypatch):
    url, certificate = self_signed
    with pytest.raises(LabelStudioError, match=r"self-signed certificate\); set SSL_CERT_FILE") as caught:
        LabelStudioClient(url, LEGACY, tries=1).project(1)
    assert not isinstance(caught.value, LabelStudioUnavailable)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(LabelStudioUnavailable, match="answered 501"):  # there is a connection
        LabelStudioClient(url, LEGACY, tries=1).project(1)


def test_other_origins_get_no_authorization():
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200)

    with httpx.Client(auth=TokenAuth(URL, LEGACY), transport=httpx.MockTransport(answer)) as http:
        for url in ("http://evil.test/x", "http://ls.test:9999/x", "https://ls.test:8080/x", URL + "/x"):
            http.get(url, headers={"Authorization": "left over"})
    assert seen == [None, None, None, f"Token {LEGACY}"]


def test_same_origin_allows_the_https_twin_only():
    base = httpx.URL("http://ls.test")
    assert same_origin(httpx.URL("http://LS.test:80/a"), base)
    assert same_origin(httpx.URL("https://ls.test/a"), base)
    assert not same_origin(httpx.URL("http://ls.test/a"), httpx.URL("https://ls.test"))
    assert not same_origin(httpx.URL("http://ls.test.evil/a"), base)


@pytest.mark.parametrize("text", ["a.b", "a.b.c", "..", "a.W10.c"])
def test_claims_of_what_is_no_token(text):
    assert token_claims(text) is None
