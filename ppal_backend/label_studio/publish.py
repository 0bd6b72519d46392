"""A round's result in Label Studio: the labeling queue with its pre-annotations, and the tab that shows it.

Label Studio's "Uncertainty sampling" serves the task with the lowest prediction score of the project's current model
version first. So a ranking becomes one prediction per task whose score is its position (``queue_scores``) under a
version name used by no other attempt, and takes effect in the one request that names this version: until then nothing
changes for anybody.

States, reported before the remote step they name::

    importing ──► imported ──► activating ──► done
        │             (after a kill: publish again with the last state)
        └── stored count is not the expected one: that version is deleted whole, a fresh one imported

The Data Manager tab is sorted by ``tasks:predictions_score``, the mean score of the predictions of the project's
current model version, so it follows every new queue by itself and is never written again. A tab shows every column that
it does not name as hidden, and Label Studio computes what it shows: about twenty columns, the score and the image
beyond the screen's edge. So a tab is made with what its page would hide.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import islice, pairwise
from typing import Any

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable, PublishError
from ppal_backend.label_studio.client import LabelStudioClient
from ppal_backend.label_studio.predictions import detections_to_result
from ppal_backend.label_studio.schema import LabelSchema, parse_label_config
from ppal_backend.label_studio.transport import Rejected, TooLarge
from ppal_backend.rounds.ports import QueueEntry
from ppal_backend.structures.round import VERSION_PREFIX, ModelRef, RoundSpec

logger = logging.getLogger(__name__)

SAMPLING = "Uncertainty sampling"
MAX_BODY_BYTES = 200 * 1024 * 1024
LEAST_BODY_BYTES = 64 * 1024
"""Bodies that are too large for somebody are sent again as smaller ones, down to this."""
EMPTY = "-empty"
"""End of the name of a version that ranks nothing: Label Studio holds no prediction of it."""
SCORE_STEP = 1e-10
"""From one place of the queue to the next."""
LARGEST_SCORE = 4e-5
"""Label Studio shows a prediction's score as a percentage with two decimals: up to here it reads 0.00%."""
END_OF_QUEUE = 4.9e-5
"""Score of what was not ranked: it comes after all that was, and reads 0.00% too."""
BUDGETS = 4
"""Query sets that the published front of a queue holds at least."""
_POLL_S = 2.0

TAB_TITLE = "PPAL queue"
DEFAULT_TAB_TITLE = "Default"
_TABS_ROUTE = "/api/dm/views/"
_COLUMNS_ROUTE = "/api/dm/columns"
QUEUE_COLUMNS = ("id", "predictions_model_versions")
"""Columns of the queue's tab beside those of the tasks' own data."""
_UNLABELLED = {"filter": "filter:tasks:total_annotations", "operator": "equal", "type": "Number", "value": 0}
QUEUE_TAB = {
    "title": TAB_TITLE,
    "ordering": ["tasks:predictions_score"],
    "filters": {"conjunction": "and", "items": [_UNLABELLED]},
}


class LabelStudioPublisher:
    """Writes queue and pre-annotations to Label Studio.

    Args:
        client: the project's Label Studio.
        keep: published versions to leave there.
        set_sampling: whether to set the project's task sampling; False once its people insist on another.
        most: tasks at the front of a queue to publish, see :func:`front_of`; 0 for all.
    """

    def __init__(self, client: LabelStudioClient, keep: int = 3, set_sampling: bool = True, most: int = 0) -> None:
        self._client, self._keep, self._set_sampling, self._most = client, keep, set_sampling, most

    def publish(
        self, spec: RoundSpec, model: ModelRef | None, queue: Sequence[QueueEntry],
        state: dict[str, Any] | None, on_state: Callable[[dict[str, Any]], None],
    ) -> str:  # fmt: skip
        """Publish the front of the queue; the labeling config is read now, so a label removed during the round is
        left out."""
        front = front_of(len(queue), self._most, spec.budget)
        config = str(self._client.project(spec.project_id)["label_config"])
        items = _items(islice(queue, front), model, parse_label_config(config, spec.from_name), spec.score_threshold)
        result = publish(
            self._client,
            spec.project_id,
            f"r{spec.number}",
            items,
            keep=self._keep,
            resume_state=state,
            on_state=on_state,
            set_sampling=self._set_sampling,
        )
        if result.version is not None:
            keep_queue_tab(self._client, spec.project_id)
        return result.version or f"{VERSION_PREFIX}p{spec.project_id}-r{spec.number}{EMPTY}"


def _items(
    queue: Iterable[QueueEntry], model: ModelRef | None, schema: LabelSchema, threshold: float
) -> Iterator[QueueItem]:
    for entry in queue:
        found = entry.detections
        if model is None or found is None or len(found) == 0:
            yield QueueItem(entry.task_id)
        else:
            result = detections_to_result(schema, model.labels, found, entry.width, entry.height, threshold)
            yield QueueItem(entry.task_id, result)


def front_of(ranked: int, most: int, budget: int) -> int:
    """How many tasks of a queue are published: those that may be labelled before the next queue comes.

    A training begins after ``budget`` annotations, so ``BUDGETS`` of them are never too few.

    Args:
        ranked: Tasks of the queue.
        most: What the operator allows; 0 for all.
        budget: Annotations that begin a training.
    """
    return min(ranked, max(most, BUDGETS * budget)) if most else ranked


@dataclass(frozen=True)
class QueueItem:
    """One task of the ranking and its pre-annotation (``[]``: none)."""

    task_id: int
    result: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class PublishResult:
    """What was published: the version in force, predictions stored, and tasks that no longer exist.

    ``version`` is None when there was nothing to rank: then nothing was changed.
    """

    version: str | None
    created: int
    gone_task_ids: tuple[int, ...] = ()
    pruned: tuple[str, ...] = ()


def publish(
    client: LabelStudioClient,
    project_id: int,
    version: str,
    items: Iterable[QueueItem],
    *,
    keep: int | None = 3,
    resume_state: Mapping[str, Any] | None = None,
    on_state: Callable[[dict[str, Any]], None] | None = None,
    settle_s: float | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    set_sampling: bool = True,
) -> PublishResult:
    """Make Label Studio serve tasks in the order of ``items``.

    Either the project's queue is the new one afterwards, or it is what it was before. One writer per project.

    Args:
        client: Label Studio.
        project_id: Project.
        version: What the version name shall tell; a prefix and a suffix unique to the attempt are added.
        items: Every task to rank, the one to label first in front; gone through once. Empty: nothing is done.
        keep: Old versions of ours to leave; None removes none (see :func:`prune_versions`).
        resume_state: The last state reported by a publish of the same items that was killed.
        on_state: Called with a JSON-ready state before each remote step; must have stored it when it returns.
        settle_s: How long a count must stand still to be believed when an import's answer was lost; grows with
            the number of items by default.
        max_body_bytes: Larger bodies are split.
        set_sampling: Whether to set the project's task sampling too; False leaves it to the people who chose another.

    Returns:
        The version in force and what was stored.

    Raises:
        PublishError: Label Studio does not store all predictions, or refuses the version.
        LabelStudioUnavailable: It is down; publish again with the last state.
        ValueError: A task is ranked twice.
    """
    with Ranking(items) as ranking:
        if not len(ranking):
            return PublishResult(version=None, created=0)
        run = _Publish(client, project_id, version, ranking, on_state, settle_s, max_body_bytes, set_sampling)
        result = run.run(dict(resume_state) if resume_state else None)
    if keep is None:
        return result
    try:
        pruned = prune_versions(client, project_id, keep, also=run.abandoned)
    except LabelStudioError as error:
        logger.warning("project %d: old versions stay for now: %s", project_id, error)
        return result
    return replace(result, pruned=tuple(pruned))


def prune_versions(client: LabelStudioClient, project_id: int, keep: int = 3, also: Iterable[str] = ()) -> list[str]:
    """Delete predictions of our old versions, slow (seconds per thousand): best when nobody labels.

    Args:
        client: Label Studio.
        project_id: Project.
        keep: Number of versions of ours, those written last, to leave. The active one is never deleted.
        also: Versions to delete whatever their age (left by failed attempts).

    Returns:
        The deleted versions.
    """
    ours = [name for name in client.model_version_counts(project_id) if name.startswith(VERSION_PREFIX)]
    failed = set(also) & set(ours)
    active = client.project(project_id).get("model_version")
    good = [name for name in ours if name not in failed]
    outdated = [name for name in ours if (name in failed or name in good[max(keep, 0) :]) and name != active]
    for name in outdated:
        delete_version(client, project_id, name)
    return outdated


def delete_version(client: LabelStudioClient, project_id: int, version: str) -> int:
    """Delete a version's predictions and keep the project's ``model_version``, which Label Studio may empty.

    Raises:
        PublishError: The version is the active one.
    """
    before = client.project(project_id).get("model_version")
    if before == version:
        raise PublishError(
            f"expected an inactive version to delete, got the active one {version!r}; activate another first"
        )
    deleted = client.delete_model_version(project_id, version)
    after = client.project(project_id).get("model_version")
    if before is not None and after != before and not after:
        try:
            client.patch_project(project_id, model_version=before)
        except Rejected as error:
            logger.warning("project %d: model_version %r could not be restored: %s", project_id, before, error)
    return deleted


def queue_scores(count: int) -> list[float]:
    """Return the scores of ``count`` ranked tasks: rising, above 0, also after a round trip through JSON.

    A place must not read as a confidence, and Label Studio shows every score as a percentage. So all are so small that
    each task says the same, 0.00%; the place is the score in steps of 1e-10 (of less in a queue of over 400,000 tasks).

    Raises:
        PublishError: Two ranks share a score (more tasks than floating point tells apart).
    """
    steps_in_one = max(round(1 / SCORE_STEP), count / LARGEST_SCORE)
    scores = [position / steps_in_one for position in range(1, count + 1)]
    sent = json.loads(json.dumps(scores))
    if any(low >= high for low, high in pairwise(sent)):
        raise PublishError(f"expected {count} distinct ranks, got two of the same score; rank fewer tasks")
    return scores


class Ranking:
    """Tasks in order with their pre-annotations, which lie compressed in a file without a name.

    Args:
        items: The tasks, gone through once.

    Raises:
        ValueError: A task is ranked twice.
    """

    def __init__(self, items: Iterable[QueueItem]) -> None:
        self.task_ids: list[int] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        digest = hashlib.blake2s(digest_size=8)
        with gzip.GzipFile(fileobj=self._file, mode="wb", compresslevel=1) as packed:
            for item in items:
                digest.update(f"{',' if self.task_ids else ''}{item.task_id}:{len(item.result)}".encode())
                self.task_ids.append(item.task_id)
                packed.write(json.dumps(list(item.result), separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self.digest = digest.hexdigest()
        """Tells this ranking from another one: of the tasks in order and the number of boxes of each."""
        if len(set(self.task_ids)) != len(self.task_ids):
            raise ValueError("expected every task once in the ranking, got one twice; rank each task once")

    def __len__(self) -> int:
        return len(self.task_ids)

    def __enter__(self) -> Ranking:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """Each task in order with its pre-annotation as JSON."""
        self._file.seek(0)
        with gzip.GzipFile(fileobj=self._file, mode="rb") as packed:
            for task_id, line in zip(self.task_ids, packed, strict=True):
                yield task_id, line.rstrip(b"\n")


@dataclass
class _Publish:
    client: LabelStudioClient
    project_id: int
    name: str
    ranking: Ranking
    on_state: Callable[[dict[str, Any]], None] | None
    settle_s: float | None
    max_body_bytes: int
    set_sampling: bool
    gone: list[int] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)

    def run(self, state: dict[str, Any] | None) -> PublishResult:
        version = self._resume(state) if state else None
        if version is None:
            version = self._import()
        self._report_state("imported", version)
        self._activate(version)
        self._report_state("done", version)
        return PublishResult(version, self.expected, tuple(self.gone))

    @property
    def expected(self) -> int:
        return len(self.ranking) - len(self.gone)

    def _report_state(self, state: str, version: str) -> None:
        logger.info("project %d: publishing %s, %s", self.project_id, version, state)
        if self.on_state is not None:
            fields = {"version": version, "state": state, "expected": self.expected, "digest": self.ranking.digest}
            self.on_state({**fields, "gone": list(self.gone), "abandoned": list(self.abandoned)})

    def _resume(self, state: dict[str, Any]) -> str | None:
        """Return the version of an earlier, killed attempt if it is whole; else clear it away. What was done may have
        been undone since: another version came into force, and old ones were deleted."""
        version, step = str(state.get("version", "")), state.get("state")
        self.abandoned = [str(name) for name in state.get("abandoned") or ()]
        if not version.startswith(VERSION_PREFIX) or step not in ("importing", "imported", "activating", "done"):
            raise PublishError(f"expected a state reported by publish, got {state!r:.200}; publish without it")
        gone = {int(i) for i in state.get("gone") or ()}
        self.gone = [task_id for task_id in self.ranking.task_ids if task_id in gone]
        same = state.get("digest") == self.ranking.digest and state.get("expected") == self.expected
        active = self.client.project(self.project_id).get("model_version") == version
        if same and active and step in ("activating", "done"):
            return version
        if active:
            self._abandon(version, clear=False)
            return None
        stored = self._settled_count(version) if step == "importing" else self._stored(version)
        if same and stored == self.expected:
            return version
        self._abandon(version)
        return None

    def _abandon(self, version: str, clear: bool = True) -> None:
        self.abandoned.append(version)
        if clear:
            self._discard(version)

    def _discard(self, version: str) -> None:
        logger.warning("project %d: removing the incomplete version %s", self.project_id, version)
        delete_version(self.client, self.project_id, version)

    def _import(self) -> str:
        """Import under a fresh version, at most twice (not counting what was too large to be taken), and return it when
        every prediction is stored."""
        last = False
        while True:
            version = self._fresh_version()
            self._report_state("importing", version)
            problem: LabelStudioError | None = None
            size = 0
            try:
                for body in self._bodies(version):
                    size = len(body)
                    self.client.import_predictions(self.project_id, body)
                stored = self._stored(version)
            except LabelStudioUnavailable as error:
                stored, problem = self._settled_count(version), error
            except Rejected as error:
                stored, problem = 0, error
            if stored == self.expected:
                return version
            self._abandon(version)
            smaller = max(size // 4, LEAST_BODY_BYTES)
            if isinstance(problem, TooLarge) and smaller < min(size, self.max_body_bytes):
                self.max_body_bytes = smaller
                continue
            gone = self._deleted_task_ids()
            if last or not (gone or isinstance(problem, LabelStudioUnavailable)):
                raise self._failure(stored, problem)
            self.gone += gone
            if not self.expected:
                raise PublishError("expected tasks to rank, got none: all were deleted meanwhile; run another round")
            last = True

    def _failure(self, stored: int, problem: LabelStudioError | None) -> LabelStudioError:
        if isinstance(problem, LabelStudioUnavailable):
            return problem
        why = "it drops predictions whose label, control or numbers the labeling config does not allow"
        if problem:
            why = f"it answered: {problem}"
        return PublishError(
            f"expected Label Studio to store {self.expected} predictions, got {stored}; {why}. The queue is as it was "
            "before; check whether the labeling config changed during the round, then run another round"
        )

    def _fresh_version(self) -> str:
        base = self.name if self.name.startswith(VERSION_PREFIX) else VERSION_PREFIX + self.name
        return f"{base[:100]}-{secrets.token_hex(3)}"

    def _bodies(self, version: str) -> Iterator[bytes]:
        """Yield JSON lists, as few as fit the limit: each request costs Label Studio a count of all tasks."""
        gone = set(self.gone)
        ranked = ((task_id, result) for task_id, result in self.ranking.rows() if task_id not in gone)
        name = json.dumps(version).encode()
        body = BytesIO()
        for (task_id, result), score in zip(ranked, queue_scores(self.expected), strict=True):
            fields = (b'{"task":%d,"result":' % task_id, result, b',"score":', json.dumps(score).encode(),
                      b',"model_version":', name, b"}")  # fmt: skip
            size = sum(map(len, fields))
            if body.tell() and body.tell() + size + 2 > self.max_body_bytes:
                body.write(b"]")
                yield body.getvalue()
                body = BytesIO()
            body.write(b"," if body.tell() else b"[")
            body.writelines(fields)
        body.write(b"]" if body.tell() else b"[]")
        yield body.getvalue()

    def _stored(self, version: str) -> int:
        return self.client.model_version_counts(self.project_id).get(version, 0)

    def _settled_count(self, version: str) -> int:
        """Return a version's stored count once it is the expected one or has stood still for a while."""
        patience_s = self.settle_s if self.settle_s is not None else 10.0 + self.expected / 500
        count, still_s = -1, 0.0
        while True:
            now = self._stored(version)
            still_s = still_s + _POLL_S if now == count else 0.0
            count = now
            if count == self.expected or still_s >= patience_s:
                return count
            self.client.transport.sleep(_POLL_S)

    def _deleted_task_ids(self) -> list[int]:
        present = set(self.client.task_ids(self.project_id)) | set(self.gone)
        return [task_id for task_id in self.ranking.task_ids if task_id not in present]

    def _activate(self, version: str) -> None:
        self._report_state("activating", version)
        try:
            activate_version(self.client, self.project_id, version, self.set_sampling)
        except Rejected as error:
            self._discard(version)
            raise PublishError(
                f"expected Label Studio to take model version {version!r}, got a refusal: {error}. The queue is as it "
                "was before; run another round"
            ) from None


def activate_version(client: LabelStudioClient, project_id: int, version: str, set_sampling: bool = True) -> None:
    """Make a version whose predictions Label Studio holds the project's queue, in one request.

    Raises:
        PublishError: Label Studio did not take it.
    """
    wanted = {"model_version": version} | ({"sampling": SAMPLING} if set_sampling else {})
    client.patch_project(project_id, **wanted)
    project = client.project(project_id)
    if any(project.get(name) != value for name, value in wanted.items()):
        raise PublishError(
            f"expected model version {version!r} with {SAMPLING!r} after setting them, got "
            f"{project.get('model_version')!r} with {project.get('sampling')!r}; somebody changed the project's "
            "settings at the same time: set its Machine Learning predictions to this version or run another round"
        )


def sampling_problem(sampling: object) -> str:
    """Why a project with this task sampling does not follow the queue, "" when it does; then what to do."""
    if sampling == SAMPLING:
        return ""
    return (
        f"task sampling is {sampling!r}, so tasks do not come in rank order; run ppal connect (or publish a round): it "
        "sets uncertainty sampling, which the settings page cannot"
    )


def version_problem(project_id: int, shown: object, active: str, titles: Iterable[object] = ()) -> str:
    """Why a project that shows this model version does not follow the queue, "" when it does; then what to do.

    Args:
        project_id: Project.
        shown: The project's ``model_version``.
        active: The version in force.
        titles: Titles of the project's model connections; such a version is the live model.
    """
    again = f"run ppal round {project_id} --rank, which publishes the queue again"
    if shown == active or active.endswith(EMPTY):
        return ""
    if not shown:
        return (
            "the project shows no predictions, so tasks come in random order; switch on Use predictions to prelabel "
            f"tasks under Annotation, then {again}"
        )
    if shown in titles:
        return (
            "the project shows the live model, so every next task waits for a prediction and comes unordered; " + again
        )
    return f"the project shows {str(shown)[:100]!r}, not the version in force {active!r}; {again}"


def keep_queue_tab(client: LabelStudioClient, project_id: int) -> None:
    """Make the tab if the project has none of its title; a failure is logged, since the queue works without it.

    A tab that somebody deleted comes back with the next queue: its absence does not tell whether it was deleted or
    never made, and a note of that would outlive the wish. A tab of the title is left as it is, whatever its columns.
    A project without any tab gets the one first that Label Studio's own page would make, so that people still land
    on all tasks.

    Args:
        client: Label Studio.
        project_id: Project.
    """
    try:
        titles = _tab_titles(client, project_id)
        if TAB_TITLE in titles:
            return
        columns = _tab_columns(client, project_id)
        if not titles:
            first = {"title": DEFAULT_TAB_TITLE, "filters": {"conjunction": "and", "items": []}}
            _create_tab(client, project_id, first | {"hiddenColumns": hidden_columns(columns)})
        _create_tab(client, project_id, QUEUE_TAB | {"hiddenColumns": hidden_columns(columns, QUEUE_COLUMNS)})
    except LabelStudioError as error:
        logger.warning("project %d: no tab %r in the Data Manager for now: %s", project_id, TAB_TITLE, error)


def hidden_columns(columns: Iterable[Mapping[str, Any]], shown: Sequence[str] | None = None) -> dict[str, list[str]]:
    """What a tab hides in the list (``explore``) and beside an open task (``labeling``).

    Args:
        columns: All columns, as Label Studio describes them.
        shown: Columns to show in the list beside those of the tasks' data; None = those Label Studio shows by itself.
    """
    hidden: dict[str, list[str]] = {"explore": [], "labeling": []}
    for column in columns:
        own = column.get("parent") == "data"
        name = f"tasks:data.{column['id']}" if own else f"tasks:{column['id']}"
        by_default = column.get("visibility_defaults")
        if not isinstance(by_default, dict):  # a heading above other columns
            continue
        in_list = by_default.get("explore", True) if shown is None else own or column["id"] in shown
        if not in_list:
            hidden["explore"].append(name)
        if not by_default.get("labeling", True):
            hidden["labeling"].append(name)
    return hidden


def _tab_columns(client: LabelStudioClient, project_id: int) -> list[dict[str, Any]]:
    answer = client.transport.get(_COLUMNS_ROUTE, {"project": project_id})
    columns = answer.get("columns") if isinstance(answer, dict) else None
    if not isinstance(columns, list):
        raise LabelStudioError("expected the columns of the project's tabs, got something else")
    return columns


def _tab_titles(client: LabelStudioClient, project_id: int) -> list[str]:
    views = client.transport.get(_TABS_ROUTE, {"project": project_id})
    if not isinstance(views, list):
        raise LabelStudioError(f"expected the project's tabs as a list, got {type(views).__name__}")
    return [str((view.get("data") or {}).get("title", "")) for view in views]


def _create_tab(client: LabelStudioClient, project_id: int, data: dict[str, Any]) -> None:
    client.transport.write("POST", _TABS_ROUTE, json={"project": project_id, "data": data})
