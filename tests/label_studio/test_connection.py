import pytest

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.connection import check_webhook

HERE = "http://ppal.local:9090"


class Client:
    """Webhooks and model connections; remembers the webhook asked for."""

    def __init__(self, hooks=(), error=None, connections=()):
        self.hooks, self.error, self.ensured = [{"url": url} for url in hooks], error, None
        self.connections = [{"url": url} for url in connections]
        self.transport = self

    def get(self, path, params):
        assert path == "/api/ml"
        return self.connections

    def webhooks(self, project_id):
        return self.hooks

    def ensure_webhook(self, project_id, url, headers):
        if self.error:
            raise self.error
        self.ensured = (project_id, url, headers)


def problem_of(client, public_url, token):
    return check_webhook(client, 7, public_url, token)[0]


def test_with_a_public_address_the_webhook_is_made_and_carries_the_token():
    client = Client()
    assert problem_of(client, HERE, "7.abc") == ""
    assert client.ensured == (7, f"{HERE}/webhook", {"Authorization": "Bearer 7.abc"})
    problem_of(client, HERE, None)
    assert client.ensured[2] is None


def test_a_webhook_that_is_right_is_not_written():
    client = Client([f"{HERE}/webhook"])
    assert problem_of(client, HERE, None) == "" and client.ensured is None


def test_an_address_that_label_studio_refuses_is_told():
    client = Client(error=LabelStudioError("Enter a valid URL."))
    assert "Enter a valid URL" in problem_of(client, "http://ppal:9090", None)


def test_label_studio_being_down_is_not_mistaken_for_a_missing_webhook():
    with pytest.raises(LabelStudioUnavailable):
        problem_of(Client(error=LabelStudioUnavailable("down")), "http://ppal.local", None)


def test_without_an_address_the_hook_that_label_studio_made_is_enough():
    assert problem_of(Client(["http://127.0.0.1:9090/webhook"]), "", None) == ""
    assert "host name with a dot" in problem_of(Client(["http://elsewhere/hook"]), "", None)


def test_with_credentials_and_without_an_address_the_gap_is_told():
    assert "set PPAL_PUBLIC_URL" in problem_of(Client(["http://127.0.0.1:9090/webhook"]), "", "7.abc")


def test_the_address_of_the_projects_one_connection_is_known():
    client = Client([f"{HERE}/webhook"], connections=[HERE])
    assert problem_of(client, "", "7.abc") == ""
    assert client.ensured == (7, f"{HERE}/webhook", {"Authorization": "Bearer 7.abc"})
    client = Client([f"{HERE}/webhook"], connections=[HERE, "http://other.local:9090"])
    assert "sends no credentials" in problem_of(client, "", "7.abc") and client.ensured is None


def test_a_hook_that_carries_the_token_needs_no_address():
    client = Client(["http://127.0.0.1:9090/webhook"])
    client.hooks[0]["headers"] = {"Authorization": "Bearer 7.abc"}
    assert problem_of(client, "", "7.abc") == ""
    assert "sends no credentials" in problem_of(client, "", "7.other")
