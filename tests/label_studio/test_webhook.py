import pytest

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.label_studio.webhook import check_webhook


class Client:
    """Remembers the webhook asked for."""

    def __init__(self, hooks=(), error=None):
        self.hooks, self.error, self.ensured = [{"url": url} for url in hooks], error, None

    def webhooks(self, project_id):
        return self.hooks

    def ensure_webhook(self, project_id, url, headers):
        if self.error:
            raise self.error
        self.ensured = (project_id, url, headers)


def test_with_a_public_address_the_webhook_is_made_and_carries_the_token():
    client = Client()
    assert check_webhook(client, 7, "http://ppal.local:9090", "7.abc") == ""
    assert client.ensured == (7, "http://ppal.local:9090/webhook", {"Authorization": "Bearer 7.abc"})
    check_webhook(client, 7, "http://ppal.local:9090", None)
    assert client.ensured[2] is None


def test_an_address_that_label_studio_refuses_is_told():
    client = Client(error=LabelStudioError("Enter a valid URL."))
    assert "Enter a valid URL" in check_webhook(client, 7, "http://ppal:9090", None)


def test_label_studio_being_down_is_not_mistaken_for_a_missing_webhook():
    with pytest.raises(LabelStudioUnavailable):
        check_webhook(Client(error=LabelStudioUnavailable("down")), 7, "http://ppal.local", None)


def test_without_an_address_the_hook_that_label_studio_made_is_enough():
    assert check_webhook(Client(["http://127.0.0.1:9090/webhook"]), 7, "", None) == ""
    assert "host name with a dot" in check_webhook(Client(["http://elsewhere/hook"]), 7, "", None)


def test_with_credentials_and_without_an_address_the_gap_is_told():
    assert "set PPAL_PUBLIC_URL" in check_webhook(Client(["http://127.0.0.1:9090/webhook"]), 7, "", "7.abc")


def test_a_hook_that_carries_the_token_needs_no_address():
    client = Client(["http://127.0.0.1:9090/webhook"])
    client.hooks[0]["headers"] = {"Authorization": "Bearer 7.abc"}
    assert check_webhook(client, 7, "", "7.abc") == ""
    assert "sends no credentials" in check_webhook(client, 7, "", "7.other")
