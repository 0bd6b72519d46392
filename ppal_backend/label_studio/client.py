"""What this package asks of Label Studio, one method per question.

Small typed calls (who am I, version, webhooks) go through ``label-studio-sdk``; what must be streamed, paged by key
or sent as one large body goes through the same connection directly. Both are signed and timed, and their
failures translated, in :mod:`ppal_backend.label_studio.transport`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import ijson

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.files import atomic_file
from ppal_backend.label_studio.auth import Addresses
from ppal_backend.label_studio.transport import NotFound, TimedOut, Transport

if TYPE_CHECKING:
    from label_studio_sdk.base_client import LabelStudioBase

log = logging.getLogger(__name__)

PAGE_SIZE = 1000
"""Tasks of a page as asked for; a Label Studio with TASK_API_PAGE_SIZE_MAX gives fewer without a word."""
PROJECTS_AT_ONCE = 100
"""As many as Label Studio gives at most."""
EXPORT_TIMEOUT_S = 1800.0
EXPORT_PATIENCE_S = 30.0
"""An export that fails after this long is not asked for as a whole again."""
EXPORT_AT_ONCE = 200
"""Tasks of an export by their ids: they stand in the address."""
_CHUNK = 1 << 16
WEBHOOK_ACTIONS = (
    "ANNOTATION_CREATED",
    "ANNOTATIONS_CREATED",
    "ANNOTATION_UPDATED",
    "ANNOTATIONS_DELETED",
    "TASKS_CREATED",
    "TASKS_DELETED",
    "PROJECT_UPDATED",
)


class DamagedExport(LabelStudioError):
    """A file that is no whole export."""


@dataclass(frozen=True)
class AnnotationStamp:
    """An annotation's identity and times, without its result."""

    id: int
    created_at: str
    updated_at: str
    was_cancelled: bool


@dataclass(frozen=True)
class TaskStamp:
    """A task that changed, and the annotations it now has."""

    id: int
    updated_at: str
    annotations: tuple[AnnotationStamp, ...]


class LabelStudioClient:
    """One Label Studio, seen by one token.

    Reads are repeated with back-off while Label Studio is unavailable; writes are sent once. Every method raises
    :class:`LabelStudioUnavailable` (down, too slow, 5xx), :class:`LabelStudioAuthError` (token refused) or
    :class:`LabelStudioError` (anything else). The token appears in no text.

    Args:
        url: Label Studio's address.
        api_key: Personal access token or legacy token; told apart by shape.
        timeout_s: Limit for reads in seconds (export and writes have longer ones).
        tries: How often a read is sent in all.
        other_urls: Further addresses of the same Label Studio; see :class:`Addresses`.
        http_transport: Replaces the network (tests).
        sleep: Replaces waiting (tests).
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        timeout_s: float = 120.0,
        *,
        tries: int = 4,
        other_urls: Sequence[str] = (),
        http_transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.transport = Transport(
            url, api_key, timeout_s=timeout_s, tries=tries, http_transport=http_transport, sleep=sleep
        )
        self.url = self.transport.base_url
        self.addresses = Addresses(self.url, tuple(other_urls))

    def __repr__(self) -> str:
        return f"LabelStudioClient({self.url!r}, token={self.token_kind!r})"

    def __enter__(self) -> LabelStudioClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.transport.close()

    @property
    def token_kind(self) -> str:
        """``"pat"`` or ``"legacy"``."""
        return self.transport.auth.kind

    @cached_property
    def _sdk(self) -> LabelStudioBase:
        """The SDK on our connection, which does the signing: the SDK itself never gets the token."""
        from label_studio_sdk.base_client import LabelStudioBase

        return LabelStudioBase(
            base_url=self.url, api_key="signed-by-transport", httpx_client=self.transport.http, max_retries=0
        )

    def whoami(self) -> dict[str, Any]:
        """Return the user behind the token (``id``, ``email``, …); the cheapest check of address and token."""
        user = self._sdk_read(lambda: self._sdk.users.whoami())
        return dict(user.model_dump(mode="json"))

    def version(self) -> str:
        """Return Label Studio's version, such as ``"1.23.2"``."""
        answer = self.transport.get("/api/version")
        return str(answer.get("release", "")) if isinstance(answer, dict) else ""

    def projects(self) -> list[dict[str, Any]]:
        """Return all projects that the token may see, ``id``, ``title`` and ``tasks`` of each."""
        rows: list[Any] = []
        while True:
            page = {"page": len(rows) // PROJECTS_AT_ONCE + 1, "page_size": PROJECTS_AT_ONCE}
            answer = self.transport.get("/api/projects/", {**page, "include": "id,title,task_number"})
            found = answer.get("results") if isinstance(answer, dict) else None
            if not isinstance(found, list):
                raise LabelStudioError(f"expected a list of projects, got {type(answer).__name__}")
            rows += found
            if len(found) < PROJECTS_AT_ONCE or len(rows) >= int(answer.get("count") or 0):
                break
        if not all(isinstance(row, dict) and "id" in row for row in rows):
            raise LabelStudioError("expected every project with its id, got one without; is LABEL_STUDIO_URL right?")
        return [
            {"id": int(row["id"]), "title": str(row.get("title") or ""), "tasks": int(row.get("task_number") or 0)}
            for row in rows
        ]

    def project(self, project_id: int) -> dict[str, Any]:
        """Return a project as Label Studio describes it (``label_config``, ``model_version``, ``sampling``, …)."""
        answer = self.transport.get(f"/api/projects/{project_id}/")
        if not isinstance(answer, dict):
            raise LabelStudioError(f"expected project {project_id} as an object, got {type(answer).__name__}")
        return answer

    def patch_project(self, project_id: int, **fields: Any) -> dict[str, Any]:
        """Change fields of a project in one request; repeated when Label Studio is unavailable (same outcome)."""
        path = f"/api/projects/{project_id}/"
        answer = self.transport.repeat(lambda: self.transport.write("PATCH", path, json=fields))
        return answer if isinstance(answer, dict) else {}

    def download_export(self, project_id: int, path: Path) -> Path:
        """Write every task that has an annotation, cancelled ones included, to ``path`` for :func:`read_export`.

        Memory use does not grow with the export. The file is replaced only by a complete one; a project without
        annotations gives ``[]``. What Label Studio does not manage as a whole, since a proxy ends it or it runs out of
        memory, is read in parts.

        Raises:
            LabelStudioError: The answer is no list of tasks.
        """

        def attempt() -> Path:
            started = time.monotonic()
            try:
                return whole()
            except LabelStudioUnavailable as error:
                if time.monotonic() - started < EXPORT_PATIENCE_S:
                    raise
                raise TimedOut(str(error)) from None  # such as 502: the Docker image ends requests after 120 s

        def whole() -> Path:
            route = f"/api/projects/{project_id}/export"
            stream = self.transport.stream(route, {"exportType": "JSON"}, timeout_s=EXPORT_TIMEOUT_S)
            with atomic_file(path) as file, stream as response:
                if "html" in response.headers.get("content-type", ""):
                    raise LabelStudioError(
                        "expected a JSON export, got a web page; check that LABEL_STUDIO_URL is Label Studio's"
                    )
                end = b""
                for chunk in response.iter_bytes(_CHUNK):
                    file.write(chunk)
                    end = (end + chunk)[-8:]
                if not end.rstrip().endswith(b"]"):
                    raise LabelStudioUnavailable("expected a complete export, got a cut-off one; try again")
            return path

        try:
            return self.transport.repeat(attempt, but=(TimedOut,))
        except LabelStudioUnavailable as error:
            log.warning("project %d: %s; its export is read in parts", project_id, error)
            try:
                return self._export_in_parts(project_id, path)
            except LabelStudioError:
                raise error from None

    def _export_in_parts(self, project_id: int, path: Path) -> Path:
        skipped = self._pages_by_id(project_id, [_filter("cancelled_annotations", "greater", "Number", 0)], "id")
        ids = sorted({*self.annotated_task_ids(project_id), *(int(task["id"]) for task in skipped)})
        with atomic_file(path, "w") as file:
            file.write("[")
            for number, task in enumerate(self.exported_tasks(project_id, ids)):
                file.write(("," if number else "") + "\n" + json.dumps(task, separators=(",", ":")))
            file.write("\n]")
        return path

    def unlabelled_tasks(self, project_id: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield ``(task_id, data)`` of every task without a submitted annotation, by rising id.

        Tasks that were only skipped have no submitted annotation and stay in the pool: somebody may label them
        still. ``data`` is raw (``s3://…`` and ``/data/upload/…`` as stored). Pages are cut by id, so tasks that are
        annotated or deleted meanwhile move no other task out of sight.
        """
        unlabelled = _filter("total_annotations", "equal", "Number", 0)
        for task in self._pages_by_id(project_id, [unlabelled], "id,data"):
            yield int(task["id"]), task["data"]

    def all_tasks(self, project_id: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield ``(task_id, data)`` of every task, by rising id; ``data`` as :meth:`unlabelled_tasks` gives it."""
        for task in self._pages_by_id(project_id, [], "id,data"):
            yield int(task["id"]), task["data"]

    def task_count(self, project_id: int) -> int:
        """How many tasks a project has."""
        return self._count(project_id, [])

    def task_ids(self, project_id: int) -> Iterator[int]:
        """Yield the ids of all tasks of a project, rising."""
        for task in self._pages_by_id(project_id, [], "id"):
            yield int(task["id"])

    def annotated_task_ids(self, project_id: int) -> Iterator[int]:
        """Yield the ids of all tasks with a submitted annotation, rising."""
        for task in self._pages_by_id(project_id, [_ANNOTATED], "id"):
            yield int(task["id"])

    def annotated_task_count(self, project_id: int) -> int:
        """How many :meth:`annotated_task_ids` would yield, in one request. The project's own
        ``num_tasks_with_annotations`` leaves out tasks whose only annotations are ground truths."""
        return self._count(project_id, [_ANNOTATED])

    def tasks_updated_since(self, project_id: int, since: str | datetime | None) -> Iterator[TaskStamp]:
        """Yield tasks changed at or after ``since``, by time of change, with their annotations' ids and times.

        Changes are: an annotation created, updated or deleted, task data edited. Imported predictions are none, and
        deleted tasks cannot be seen here. Tasks at exactly ``since`` come again: pass the last ``updated_at`` seen.

        Args:
            project_id: Project.
            since: ISO time of Label Studio or an aware datetime; None for all tasks.

        Raises:
            ValueError: ``since`` is a datetime without a time zone.
        """
        include = "id,updated_at,annotations,created_at,was_cancelled"
        yield from map(_stamp, self._pages_by_change(project_id, since, include, annotations=True))

    def changed_tasks(self, project_id: int, since: str | datetime) -> Iterator[dict[str, Any]]:
        """Yield tasks changed at or after ``since`` as :meth:`tasks_updated_since` does, without their annotations but
        with ``data``, ``total_annotations`` (submitted) and ``cancelled_annotations`` (skips)."""
        include = "id,data,updated_at,total_annotations,cancelled_annotations"
        yield from self._pages_by_change(project_id, since, include)

    def last_change(self, project_id: int) -> str:
        """When a task of the project was last changed; "" for a project without tasks."""
        newest = self._page(project_id, [], "-tasks:updated_at", "id,updated_at", size=1)["tasks"]
        return _timestamp(str(newest[0]["updated_at"])) or "" if newest else ""

    def exported_tasks(self, project_id: int, task_ids: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield those of some tasks that have an annotation, as :meth:`download_export` writes them."""
        waiting = iter(task_ids)
        while batch := list(islice(waiting, EXPORT_AT_ONCE)):
            answer = self.transport.get(
                f"/api/projects/{project_id}/export", {"exportType": "JSON", "ids[]": batch}, EXPORT_TIMEOUT_S
            )
            if not isinstance(answer, list):
                raise LabelStudioError(f"expected an export of {len(batch)} tasks, got {type(answer).__name__}")
            yield from answer

    def exported_stamps(self, project_id: int, task_ids: Iterable[int]) -> Iterator[TaskStamp]:
        """Yield those of some tasks that have an annotation, as :meth:`tasks_updated_since` does."""
        yield from map(_stamp, self.exported_tasks(project_id, task_ids))

    def import_predictions(self, project_id: int, body: bytes) -> int:
        """Import predictions in one request and return how many Label Studio created.

        It drops invalid ones silently: compare the count. Sent once: after an error read back with
        :meth:`model_version_counts` before sending again.

        Args:
            project_id: Project.
            body: JSON list of ``{"task", "result", "score", "model_version"}`` each.
        """
        limit = max(300.0, len(body) / 1e5)
        answer = self.transport.write(
            "POST", f"/api/projects/{project_id}/import/predictions", content=body, timeout_s=limit
        )
        return int(answer.get("created", 0)) if isinstance(answer, dict) else 0

    def model_version_counts(self, project_id: int) -> dict[str, int]:
        """Return the number of stored predictions by version, the version written to last first."""
        answer = self.transport.get(f"/api/projects/{project_id}/model-versions", {"extended": "true"})
        rows = answer.get("static", []) if isinstance(answer, dict) else []
        return {str(row["model_version"]): int(row["count"]) for row in rows}

    def delete_model_version(self, project_id: int, version: str) -> int:
        """Delete every prediction of a version and return their number; repeated when unavailable.

        Label Studio empties the project's ``model_version`` when it is this one, and at times when it is another:
        callers that need it kept must read and restore it.
        """
        path, body = f"/api/projects/{project_id}/model-versions", {"model_version": version}
        answer = self.transport.repeat(lambda: self.transport.write("DELETE", path, json=body, timeout_s=900.0))
        return int(answer.get("deleted_predictions", 0)) if isinstance(answer, dict) else 0

    def task(self, task_id: int) -> dict[str, Any] | None:
        """Return a task with its annotations (``id``, ``result``, ``was_cancelled``, …); None where it is gone."""
        try:
            answer = self.transport.get(f"/api/tasks/{task_id}/")
        except NotFound:
            return None
        if not isinstance(answer, dict):
            raise LabelStudioError(f"expected task {task_id} as an object, got {type(answer).__name__}")
        return answer

    def create_annotation(self, task_id: int, result: Sequence[Mapping[str, Any]], person: int | None = None) -> int:
        """Submit an annotation, once, and return its id.

        Args:
            task_id: Task.
            result: Regions.
            person: Id of the user in whose name; None for the token's own.
        """
        body = {"result": list(result), **({} if person is None else {"completed_by": person})}
        answer = self.transport.write("POST", f"/api/tasks/{task_id}/annotations/", json=body)
        if not isinstance(answer, dict) or "id" not in answer:
            raise LabelStudioError(f"expected the annotation of task {task_id} with its id, got something else")
        return int(answer["id"])

    def delete_annotation(self, annotation_id: int) -> None:
        """Delete an annotation; one that is gone is no error."""
        try:
            self.transport.repeat(lambda: self.transport.write("DELETE", f"/api/annotations/{annotation_id}/"))
        except NotFound:
            return

    def users(self) -> dict[str, int]:
        """Return the ids of the people that the token may see, by email in lower case."""
        answer = self.transport.get("/api/users/")
        rows = answer if isinstance(answer, list) else (answer or {}).get("results", ())
        return {str(row["email"]).lower(): int(row["id"]) for row in rows if row.get("email")}

    def webhooks(self, project_id: int) -> list[dict[str, Any]]:
        """Return the project's webhooks (``id``, ``url``, ``actions``, ``headers``, ``is_active``, …)."""
        hooks = self._sdk_read(lambda: self._sdk.webhooks.list(project=project_id))
        return [hook.model_dump(mode="json") for hook in hooks if hook.project == project_id]

    def ensure_webhook(self, project_id: int, url: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Make the project send its events to ``url``: create the webhook, or repair the one that points there.

        It asks for :data:`WEBHOOK_ACTIONS`; an existing hook keeps its further ones.

        Args:
            project_id: Project.
            url: Address of the events route as Label Studio reaches it; a host name needs a dot.
            headers: Headers Label Studio shall send (credentials); None leaves existing ones as they are.

        Returns:
            The webhook as stored.

        Raises:
            LabelStudioError: Label Studio refuses the address (no dot in the host name, or a blocked network).
        """
        ours = [hook for hook in self.webhooks(project_id) if hook["url"].rstrip("/") == url.rstrip("/")]
        if not ours:
            fields = {"url": url, "project": project_id, "headers": dict(headers or {}), "is_active": True}
            fields |= {"actions": list(WEBHOOK_ACTIONS), "send_payload": True, "send_for_all_actions": False}
            self.transport.sdk_call(lambda: self._sdk.webhooks.create(**fields))
            ours = [hook for hook in self.webhooks(project_id) if hook["url"].rstrip("/") == url.rstrip("/")]
            if not ours:
                raise LabelStudioError(
                    f"expected a webhook to {url.split('?')[0]!r} after creating it, got none; try again"
                )
            return ours[0]
        hook = ours[0]
        wanted = dict(hook) if headers is None else {**hook, "headers": dict(headers)}
        wanted |= {"is_active": True, "send_payload": True}
        if not hook["send_for_all_actions"]:
            wanted["actions"] = sorted(set(hook["actions"] or ()) | set(WEBHOOK_ACTIONS))
        if wanted == {**hook, "actions": sorted(hook["actions"] or ())}:
            return hook
        keys = ("url", "headers", "actions", "is_active", "send_payload", "send_for_all_actions")
        change = {key: wanted[key] for key in keys}
        self.transport.repeat(lambda: self.transport.sdk_call(lambda: self._sdk.webhooks.update(hook["id"], **change)))
        return {**hook, **change}

    def _sdk_read(self, call: Callable[[], Any]) -> Any:
        return self.transport.repeat(lambda: self.transport.sdk_call(call))

    def _pages_by_change(
        self, project_id: int, since: str | datetime | None, include: str, annotations: bool = False
    ) -> Iterator[dict[str, Any]]:
        cursor, operator, seen = _timestamp(since), "greater_or_equal", set[tuple[int, str]]()
        while True:
            filters = [_filter("updated_at", operator, "Datetime", cursor)] if cursor else []
            answer = self._page(project_id, filters, "tasks:updated_at", include, annotations)
            tasks: Iterable[dict[str, Any]] = answer["tasks"]
            is_last = _is_last(answer)
            if not is_last:
                first, cursor = (_timestamp(str(answer["tasks"][i]["updated_at"])) for i in (0, -1))
                operator = "greater_or_equal"
                if first == cursor:  # a bulk action gives many tasks one time, and their order is left to the database
                    same = [_filter("updated_at", "equal", "Datetime", cursor)]
                    tasks, operator = self._pages_by_id(project_id, same, include, annotations), "greater"
            for task in tasks:
                task["updated_at"] = _timestamp(str(task["updated_at"]))
                stamp = int(task["id"]), str(task["updated_at"])
                if stamp not in seen:
                    seen.add(stamp)
                    yield task
            if is_last:
                return

    def _pages_by_id(
        self, project_id: int, filters: list[dict[str, Any]], include: str, annotations: bool = False
    ) -> Iterator[dict[str, Any]]:
        last: int | None = None
        while True:
            after = [] if last is None else [_filter("id", "greater", "Number", last)]
            answer = self._page(project_id, filters + after, "tasks:id", include, annotations)
            yield from answer["tasks"]
            if _is_last(answer):
                return
            last = int(answer["tasks"][-1]["id"])

    def _count(self, project_id: int, filters: list[dict[str, Any]]) -> int:
        return int(self._page(project_id, filters, "tasks:id", "id", size=1).get("total") or 0)

    def _page(
        self,
        project_id: int,
        filters: list[dict[str, Any]],
        ordering: str,
        include: str,
        annotations: bool = False,
        size: int | None = None,
    ) -> dict[str, Any]:
        """The first page of tasks with how many there are in all (``total``)."""
        query = {"filters": {"conjunction": "and", "items": filters}, "ordering": [ordering]}
        params = {
            "project": project_id,
            "page": 1,
            "page_size": size or PAGE_SIZE,
            "include": include,
            "resolve_uri": "false",
            "query": json.dumps(query),
        }
        if annotations:
            params["fields"] = "all"
        answer = self.transport.get("/api/tasks", params)
        if not isinstance(answer, dict) or not isinstance(answer.get("tasks"), list):
            raise LabelStudioError("expected a page of tasks, got something else; check Label Studio's version")
        return answer


def read_export(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the tasks of an export file one by one, without holding the others.

    Raises:
        DamagedExport: The file is cut off or is no list of tasks.
    """
    with path.open("rb") as file:
        try:
            yield from ijson.items(file, "item", use_float=True)
        except ijson.JSONError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedExport(
                f"expected a complete JSON export in {path.name}, got a broken one ({reason}); export again"
            ) from None


def _is_last(answer: Mapping[str, Any]) -> bool:
    """Whether a page holds all the tasks that were asked for: a short one alone need not."""
    total, given = answer.get("total"), len(answer["tasks"])
    return not given or (given >= total if isinstance(total, int) else given < PAGE_SIZE)


def _filter(column: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}


_ANNOTATED = _filter("total_annotations", "greater", "Number", 0)


def _timestamp(since: str | datetime | None) -> str | None:
    """A time as Label Studio's filters take it, always with microseconds: its own texts lack them on full seconds."""
    if isinstance(since, str) and since:
        try:
            since = datetime.fromisoformat(since)
        except ValueError:
            raise LabelStudioError(
                f"expected the time of a change, got {since!r:.60}; check Label Studio's version"
            ) from None
        since = since if since.tzinfo else since.replace(tzinfo=UTC)
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise ValueError("expected an aware datetime, got one without time zone; use datetime.now(UTC)")
        since = since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return since


def _stamp(task: Mapping[str, Any]) -> TaskStamp:
    rows = task.get("annotations") or []
    annotations = tuple(
        AnnotationStamp(
            id=int(row["id"]),
            created_at=str(row.get("created_at") or ""),
            updated_at=str(row.get("updated_at") or ""),
            was_cancelled=bool(row.get("was_cancelled")),
        )
        for row in rows
    )
    return TaskStamp(id=int(task["id"]), updated_at=str(task["updated_at"]), annotations=annotations)
