"""A Label Studio in memory behind ``httpx.MockTransport``: the calls this package makes, with its traps."""

from __future__ import annotations

import base64
import json
import operator
import random
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx

from ppal_backend.label_studio.client import LabelStudioClient

LEGACY = "0123456789abcdef0123456789abcdef01234567"
URL = "http://ls.test:8080"


def jwt(token_type: str, lifetime_s: int = 300, issued: int = 1_000_000, tag: str = "") -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    claims = {"token_type": token_type, "iat": issued, "exp": issued + lifetime_s, "jti": tag}
    return f"{part({'alg': 'HS256'})}.{part(claims)}.c2lnbmF0dXJl{tag}"


PAT = jwt("refresh", lifetime_s=10**9, tag="pat")


class FakeLabelStudio:
    """Tasks, annotations and predictions of projects; ``fault`` may answer or raise before a request is handled. Tasks
    of one time come in another order with every request, as PostgreSQL may give them."""

    def __init__(self, tasks: int = 5) -> None:
        self.tasks: dict[int, dict[str, Any]] = {}
        self.predictions: list[dict[str, Any]] = []
        self.project = {"id": 1, "model_version": "", "sampling": "Sequential sampling", "label_config": "<View/>"}
        self.hooks: list[dict[str, Any]] = []
        self.requests: list[httpx.Request] = []
        self.access: list[str] = []
        self.valid_access: set[str] = set()
        self.others: list[dict[str, Any]] = []  # further projects, as its list shows them
        self.fault: Callable[[httpx.Request], httpx.Response | None] = lambda request: None
        self.after: Callable[[httpx.Request, httpx.Response], httpx.Response] = lambda request, response: response
        self.drop: Callable[[dict[str, Any]], bool] = lambda item: False
        self.stale: dict[int, dict[str, int]] = {}  # counters of tasks that the real one failed to keep up to date
        self.most_on_a_page = 10**6  # TASK_API_PAGE_SIZE_MAX of the real one, which cuts without a word
        for i in range(1, tasks + 1):
            self.add_task(i)

    def add_task(self, task_id: int, annotations: list[dict[str, Any]] | None = None) -> None:
        self.tasks[task_id] = {
            "id": task_id,
            "data": {"image": f"/data/upload/1/{task_id}.jpg"},
            "annotations": annotations or [],
            "updated_at": f"2026-01-01T00:00:{task_id % 60:02d}.000000Z",
        }

    def client(self, api_key: str = LEGACY, **options: Any) -> LabelStudioClient:
        options = {"sleep": lambda seconds: None} | options
        return LabelStudioClient(URL, api_key, http_transport=httpx.MockTransport(self), **options)

    def paths(self, method: str | None = None) -> list[str]:
        return [r.url.path for r in self.requests if method in (None, r.method)]

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for prediction in self.predictions:
            found[prediction["model_version"]] = found.get(prediction["model_version"], 0) + 1
        return found

    def served(self) -> list[int]:
        """Ids of the tasks in the order Label Studio would serve them."""
        rows = [p for p in self.predictions if p["model_version"] == self.project["model_version"]]
        return [p["task"] for p in sorted(rows, key=lambda p: p["score"])]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = self.fault(request) or self._refused(request) or self._answer(request)
        return self.after(request, response)

    def _refused(self, request: httpx.Request) -> httpx.Response | None:
        if request.url.path == "/api/token/refresh/":
            if json.loads(request.content)["refresh"] != PAT:
                return httpx.Response(401, json={"detail": "Token is invalid"})
            token = jwt("access", tag=f"a{len(self.access)}")
            self.access.append(token)
            self.valid_access = {token}
            return httpx.Response(200, json={"access": token})
        sent = request.headers.get("authorization", "")
        if sent == f"Token {LEGACY}" or sent.removeprefix("Bearer ") in self.valid_access:
            return None
        return httpx.Response(401, json={"detail": "Authentication credentials were not provided."})

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path, method = request.url.path, request.method
        body = json.loads(request.content) if request.content else None
        if path == "/api/tasks":
            return self._tasks(request)
        if path.endswith("/export"):
            wanted = [int(i) for i in request.url.params.get_list("ids[]")]
            rows = [t for t in self.tasks.values() if t["annotations"] and (not wanted or t["id"] in wanted)]
            return httpx.Response(200, json=rows)
        if path.endswith("/import/predictions"):
            return self._import(body)
        if path.endswith("/model-versions"):
            return self._versions(method, body)
        if path.startswith("/api/webhooks"):
            return self._webhooks(request, body)
        if path == "/api/current-user/whoami":
            return httpx.Response(200, json={"id": 7, "email": "a@example.com"})
        if path == "/api/version":
            return httpx.Response(200, json={"release": "1.23.2"})
        if path == "/api/projects/":
            shown = {"id": 1, "title": self.project.get("title", ""), "task_number": len(self.tasks)}
            rows, page = [shown, *self.others], int(request.url.params.get("page", 1))
            part = rows[(page - 1) * 100 : page * 100]
            if not part:
                return httpx.Response(404, json={"detail": "Invalid page."})
            return httpx.Response(200, json={"count": len(rows), "results": part})
        if path == "/api/users/":
            return httpx.Response(
                200, json=[{"id": 7, "email": "a@example.com"}, {"id": 8, "email": "Ann@example.com"}]
            )
        if re.fullmatch(r"/api/(tasks/\d+|annotations/\d+|tasks/\d+/annotations)/", path):
            return self._annotating(method, path.split("/")[2:-1], body)
        if re.fullmatch(r"/api/projects/1/", path):
            return self._project(method, body)
        return httpx.Response(404, json={"detail": "No Project matches the given query."})

    def _tasks(self, request: httpx.Request) -> httpx.Response:
        params = request.url.params
        query, page = json.loads(params["query"]), int(params["page"])
        size = min(int(params["page_size"]), self.most_on_a_page)
        rows = [{**t, **_counts(t["annotations"]), **self.stale.get(t["id"], {})} for t in self.tasks.values()]
        for item in query["filters"]["items"]:
            column = item["filter"].removeprefix("filter:tasks:")
            if column == "total_annotations":
                rows = [t for t in rows if bool(t["total_annotations"]) == (item["operator"] == "greater")]
            elif column == "updated_at":
                try:
                    since = datetime.strptime(item["value"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
                except ValueError as error:
                    return httpx.Response(500, json={"detail": str(error)})
                compare = _COMPARE[item["operator"]]
                rows = [t for t in rows if compare(datetime.fromisoformat(t[column]), since)]
            elif item["operator"] == "greater":
                rows = [t for t in rows if t[column] > item["value"]]
            else:
                rows = [t for t in rows if t[column] >= item["value"]]
        by = query["ordering"][0]
        by_time = by.endswith("updated_at")
        column = by.removeprefix("-").removeprefix("tasks:")
        random.Random(len(self.requests)).shuffle(rows)
        rows.sort(key=lambda t: datetime.fromisoformat(t[column]) if by_time else t[column], reverse=by.startswith("-"))
        part = rows[(page - 1) * size : page * size]
        if not part and page > 1:
            return httpx.Response(404, json={"detail": "Invalid page."})
        include = set(params["include"].split(","))
        shown = [{k: v for k, v in t.items() if k in include} for t in part]
        return httpx.Response(200, json={"tasks": shown, "total": len(rows)})

    def _annotating(self, method: str, parts: list[str], body: Any) -> httpx.Response:
        """One task, and its annotations made and deleted."""
        number = int(parts[1])
        if parts[0] == "annotations":
            for task in self.tasks.values():
                kept = [a for a in task["annotations"] if a["id"] != number]
                if len(kept) < len(task["annotations"]):
                    task["annotations"] = kept
                    return httpx.Response(204)
            return httpx.Response(404, json={"detail": "No Annotation matches the given query."})
        if number not in self.tasks:
            return httpx.Response(404, json={"detail": "No Task matches the given query."})
        if method == "GET":
            return httpx.Response(200, json=self.tasks[number])
        known = [a["id"] for t in self.tasks.values() for a in t["annotations"]]
        made = {"id": max([5000, *known]) + 1, "completed_by": 7, "was_cancelled": False, **body}
        self.tasks[number]["annotations"].append(made)
        return httpx.Response(201, json=made)

    def _import(self, items: list[dict[str, Any]]) -> httpx.Response:
        for item in items:
            if item["task"] not in self.tasks:
                return httpx.Response(400, json={"detail": "Validation error", "validation_errors": ["invalid task"]})
        kept = [dict(item) for item in items if not self.drop(item)]
        self.predictions += kept
        return httpx.Response(201, json={"created": len(kept)})

    def _versions(self, method: str, body: Any) -> httpx.Response:
        if method == "GET":
            newest = dict(reversed(self.counts().items()))
            rows = [{"model_version": name, "count": count} for name, count in newest.items()]
            return httpx.Response(200, json={"static": rows, "live": None})
        doomed = [p for p in self.predictions if p["model_version"] == body["model_version"]]
        self.predictions = [p for p in self.predictions if p not in doomed]
        if self.project["model_version"] not in self.counts():
            self.project["model_version"] = None
        return httpx.Response(200, json={"deleted_predictions": len(doomed)})

    def _project(self, method: str, body: Any) -> httpx.Response:
        if method == "PATCH":
            version = body.get("model_version", "")
            if version and version not in self.counts() and version != "Live backend":
                reason = {"model_version": ["Model version doesn't exist either as live model or static predictions."]}
                return httpx.Response(400, json={"detail": "Validation error", "validation_errors": reason})
            self.project.update(body)
        totals = [_counts(task["annotations"]) for task in self.tasks.values()]
        counts = {
            "task_number": len(totals),
            "total_annotations_number": sum(t["total_annotations"] for t in totals),
            "skipped_annotations_number": sum(t["cancelled_annotations"] for t in totals),
        }
        return httpx.Response(200, json=counts | self.project)

    def _webhooks(self, request: httpx.Request, body: Any) -> httpx.Response:
        if request.method == "POST":
            hook = {"id": len(self.hooks) + 1, "organization": 1, **body}
            self.hooks.append(hook)
            return httpx.Response(201, json=hook)
        if request.method == "PATCH":
            number = int(request.url.path.strip("/").rsplit("/", 1)[-1])
            hook = next(h for h in self.hooks if h["id"] == number)
            hook.update({"actions": []} | body)
            return httpx.Response(200, json=hook)
        return httpx.Response(200, json=self.hooks)


_COMPARE = {"greater_or_equal": operator.ge, "greater": operator.gt, "equal": operator.eq}


def _counts(annotations: list[dict[str, Any]]) -> dict[str, int]:
    skips = sum(bool(a.get("was_cancelled")) for a in annotations)
    return {"total_annotations": len(annotations) - skips, "cancelled_annotations": skips}
