"""Buttons that only a page of this backend can press: a browser sends credentials along with anybody's form."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from ppal_backend.service.http_errors import RequestError

FIELD = "token"


class FormTokens:
    """Tokens of forms, by project; valid for as long as this process serves."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def make(self, project_id: int) -> str:
        """The token that the project's forms carry."""
        return hmac.new(self._key, f"project {project_id}".encode(), hashlib.sha256).hexdigest()

    def check(self, project_id: int, token: str) -> None:
        """Refuse a form that does not carry the project's token.

        Raises:
            RequestError: (403) it came from elsewhere, or from a page that is older than this process.
        """
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.make(project_id).encode()):
            raise RequestError("this page is older than the backend; open it again and press once more", status=403)
