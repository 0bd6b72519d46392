"""The routes under ``/ui``. Pages read, buttons write a wish into the store; nothing here waits for a round."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from flask import (
    Blueprint,
    Flask,
    Response,
    current_app,
    jsonify,
    redirect,
    render_template,
    request,
    send_file,
    url_for,
)
from markupsafe import Markup, escape
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from ppal_backend.doctor import Finding
from ppal_backend.doctor.health import LABEL_STUDIO_NOTE, health, next_try
from ppal_backend.errors import PPALError
from ppal_backend.label_studio.source import open_client
from ppal_backend.operations import approvals, control, steering
from ppal_backend.operations.detectors import choose_by_hand
from ppal_backend.service.dashboard import approve as approve_pages
from ppal_backend.service.dashboard import errors as error_pages
from ppal_backend.service.dashboard import learning as learning_pages
from ppal_backend.service.dashboard import now as now_pages
from ppal_backend.service.dashboard import origins
from ppal_backend.service.dashboard import quality as quality_pages
from ppal_backend.service.dashboard import queue as queue_pages
from ppal_backend.service.dashboard import similar as similar_pages
from ppal_backend.service.dashboard.project import IMAGE_TYPES, Project
from ppal_backend.service.http_errors import RequestError, status_of
from ppal_backend.service.payloads import LARGEST_PROJECT_ID
from ppal_backend.service.runtime import Runtime
from ppal_backend.settings import Settings
from ppal_backend.store import ModelVersion
from ppal_backend.structures.quality import Quality, count, map_text, percent, signed

if TYPE_CHECKING:
    from ppal_backend.label_studio.client import LabelStudioClient

log = logging.getLogger(__name__)

EXTENSION = "ppal_dashboard"
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
IMAGE_AGE_S = 3600
FIELD = "token"
PROJECT = f"/projects/<int(max={LARGEST_PROJECT_ID}):project_id>"
DONE = {
    "train": "A training is asked for; a running worker takes it up within seconds.",
    "cancel": "The open rounds are being cancelled.",
    "pause": "Paused: the running round stops at the next safe point, no other starts.",
    "resume": "The project's rounds go on.",
    "connect": "Connected. The first round puts the tasks in order; then press Label now.",
    "retry": "It is tried again; a running worker does so within seconds.",
    "rollback": "The earlier version is in force again.",
    "detector": "The next training uses the detector that was chosen.",
    "steer": "Kept. The queue comes in its new order within minutes, without a training.",
    "unsteered": "Nothing of that was asked of the queue.",
    "approve": "Approved: Label Studio has the annotations. The batch stands below, and can be undone.",
    "approve-some": "Approved but for images that were labelled or deleted meanwhile; the batch stands below.",
    "approve-none": "None was approved: they were labelled, approved or deleted meanwhile.",
    "undo": "The batch is undone: its annotations are deleted.",
    "undo-some": "The batch is undone but for annotations that people have changed since: these are theirs now.",
}
"""What a page says after a button; told by name, so that no address can put words on a page."""

ConnectTo = Callable[[Settings, str], "LabelStudioClient"]

ui = Blueprint("ui", __name__, url_prefix="/ui", template_folder="templates", static_folder="static")


class FormTokens:
    """Tokens of forms, by project; valid for as long as this process serves.

    Only a page of this backend can press its buttons: a browser sends credentials along with anybody's form.
    """

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


@dataclass(frozen=True)
class Actions:
    """The buttons of one backend.

    Every method raises:
        StateError: the project's state does not allow it; the text says why.

    Args:
        runtime: what the service works with.
        connect_to: opens a Label Studio, for going back to a version.
    """

    runtime: Runtime
    connect_to: ConnectTo = open_client

    def train(self, project_id: int) -> str:
        """Ask for a training now; what was done, in a sentence."""
        record = self.runtime.store.rounds.request(project_id, "train", "training was asked for on the dashboard")
        self.runtime.notifier.notify(project_id)
        return f"Round {record.number} is asked for; a running worker takes it up within seconds."

    def cancel(self, project_id: int) -> str:
        """Stop the open rounds for good; the annotations that asked for one do not ask again."""
        cancelled = control.cancel(self.runtime.store, project_id)
        return f"Cancelled: round {', '.join(str(r.number) for r in cancelled)}."

    def pause(self, project_id: int) -> str:
        """Hold the project's rounds; the running one saves what it has and leaves."""
        control.pause(self.runtime.store, project_id)
        return "Paused: the running round stops at the next safe point, no other starts."

    def resume(self, project_id: int) -> str:
        """Let paused rounds go on."""
        control.resume(self.runtime.store, project_id)
        self.runtime.notifier.notify(project_id)
        return "Resumed."

    def retry(self, project_id: int) -> str:
        """Try at once what waits or has failed."""
        done = control.try_again(self.runtime.store, project_id)
        self.runtime.notifier.notify(project_id)
        return done

    def connect(self, project_id: int, backend_url: str) -> str:
        """Connect a project of the Label Studio of the settings, as its dialog Connect Model does."""
        from ppal_backend.doctor.connecting import connect_project

        settings = self.runtime.settings
        with self.connect_to(settings, "") as client:
            steps = connect_project(client, settings, project_id, backend_url)
        return ", ".join(f"{step.what} {step.done}" for step in steps)

    def choose_detector(self, project_id: int, name: str) -> str:
        """Let the next trainings train another detector; ``auto`` for a choice by the zoo's order."""
        choice = choose_by_hand(self.runtime.settings, self.runtime.store, project_id, name)
        self.runtime.notifier.notify(project_id)
        return f"The next training uses {choice.detector}." if choice else "The next round chooses a detector."

    def roll_back(self, project_id: int, version: str) -> str:
        """Make an earlier version the one in force again."""
        project = self.runtime.store.projects.get(project_id)
        with self.connect_to(self.runtime.settings, project.url) as client:
            done = control.roll_back(self.runtime.settings, self.runtime.store, client, project_id, version)
        log.info("project %d: went back to %s, as %s", project_id, version, done.version)
        again = f", published again as {done.version}" if done.published_again else ""
        return f"Version {version} is in force again{again}: {done.predictions} tasks."

    def steer(self, project_id: int, form: MultiDict[str, str]) -> steering.Steered:
        """Pin tasks, take pins back, keep a quota or take it back, as a form asks.

        Raises:
            RequestError: the form asks for nothing of that.
        """
        store, do = self.runtime.store, form.get("do", "")
        tasks = form.getlist("task", type=int)
        if do in ("first", "last"):
            done = steering.pin(store, project_id, tasks, "first" if do == "first" else "last")
        elif do == "unpin":
            done = steering.unpin(store, project_id, tasks)
        elif do == "quota":
            text = f"{form.get('share', '')}% {form.get('kind', '')}:{form.get('what', '')}"
            done = steering.add_quota(self.runtime.settings, store, project_id, text)
        elif do == "unquota":
            done = steering.remove_quota(store, project_id, form.get("quota", 0, type=int))
        else:
            raise RequestError("expected a form that says what to do with the queue; open the page again")
        self.runtime.notifier.notify(project_id)
        return done

    def approve(self, project_id: int, form: MultiDict[str, str]) -> approvals.Approved:
        """Make annotations of the pre-annotations that were ticked."""
        runtime = self.runtime
        record = runtime.store.projects.get(project_id)
        snapshot = Project(runtime, record).snapshot
        precision = approvals.precision_at(snapshot[1] if snapshot else {}, form.get("at", 0.0, type=float))
        tasks, annotator = form.getlist("task", type=int), form.get("annotator", "").strip()
        with self.connect_to(runtime.settings, record.url) as client:
            done = approvals.approve(
                runtime.settings,
                runtime.store,
                client,
                project_id,
                form.get("version", ""),
                precision,
                tasks,
                annotator,
            )
        runtime.notifier.notify(project_id)
        return done

    def undo_approval(self, project_id: int, batch_id: int) -> approvals.Undone:
        """Delete a batch's annotations again."""
        record = self.runtime.store.projects.get(project_id)
        with self.connect_to(self.runtime.settings, record.url) as client:
            return approvals.undo(self.runtime.store, client, project_id, batch_id)

    def earlier_versions(self, project_id: int) -> list[ModelVersion]:
        """Versions that can be gone back to, newest first."""
        project = self.runtime.store.projects.get(project_id)
        versions = self.runtime.store.versions.of_project(project_id)[::-1]
        recent = self.runtime.settings.keep_versions
        kept = self.runtime.fetched.with_queue(project, {v.round_number for v in versions[recent:]})
        return [v for i, v in enumerate(versions) if not v.active and (i < recent or v.round_number in kept)]


class Dashboard:
    """What the pages of one app work with."""

    def __init__(self, runtime: Runtime, actions: Actions) -> None:
        self.runtime, self.actions, self.tokens = runtime, actions, FormTokens()


def install(app: Flask, runtime: Runtime) -> None:
    """Serve the dashboard from ``app``."""
    app.extensions[EXTENSION] = Dashboard(runtime, Actions(runtime))
    app.register_blueprint(ui)


def _dashboard() -> Dashboard:
    value: Dashboard = current_app.extensions[EXTENSION]
    return value


def _project(project_id: int) -> Project:
    return Project(_dashboard().runtime, _dashboard().runtime.store.projects.get(project_id))


def _page(name: str, project: Project, **values: Any) -> str:
    runtime = _dashboard().runtime
    return render_template(
        f"ppal/{name}.html",
        project=project,
        page_name=name,
        findings=health(runtime.settings, runtime.store, project.record),
        token=_dashboard().tokens.make(project.id),
        **values,
    )


def _with_buttons(project: Project) -> dict[str, Any]:
    return {
        **now_pages.now_page(project),
        "earlier": _dashboard().actions.earlier_versions(project.id),
        "done": DONE.get(request.args.get("done", "")),
    }


@ui.get("/")
def overview() -> str:
    """All projects."""
    runtime = _dashboard().runtime
    projects = [Project(runtime, record) for record in runtime.store.projects.all()]
    shared = health(runtime.settings, runtime.store)
    rows = [
        {
            **row,
            "findings": [f for f in health(runtime.settings, runtime.store, row["project"].record) if f not in shared],
            "token": _dashboard().tokens.make(row["project"].id),
        }
        for row in now_pages.overview(projects)
    ]
    known, (note, _) = {p.id for p in projects}, runtime.store.notes.get(LABEL_STUDIO_NOTE)
    others = [
        {**found, "token": _dashboard().tokens.make(int(found["id"]))}
        for found in note.get("projects", ())
        if found["id"] not in known
    ]
    return render_template(
        "ppal/overview.html", rows=rows, findings=shared, others=others, address=_own_address(), is_known=bool(note)
    )


@ui.post(f"{PROJECT}/connect")
def connect(project_id: int) -> AnyResponse:
    """Connects a project that this backend does not know yet."""
    _dashboard().tokens.check(project_id, request.form.get(FIELD, ""))
    said = _dashboard().actions.connect(project_id, _own_address())
    log.info("project %d was connected on the dashboard: %s", project_id, said)
    return redirect(url_for("ui.now", project_id=project_id, done="connect"), code=303)


def _own_address() -> str:
    """This backend's address: what the operator set, else how the browser has reached it."""
    return _dashboard().runtime.settings.public_url or request.host_url.rstrip("/")


@ui.get(f"{PROJECT}/")
def now(project_id: int) -> str:
    """What the machine does now, and the buttons."""
    project = _project(project_id)
    return _page("now", project, **_with_buttons(project))


@ui.get(f"{PROJECT}/live")
def live(project_id: int) -> str:
    """The part of the page before that changes by itself."""
    project = _project(project_id)
    return _page("live", project, **_with_buttons(project))


@ui.get(f"{PROJECT}/learning")
def learning(project_id: int) -> str:
    """mAP over labels, and whether labeling more pays."""
    project = _project(project_id)
    goal = request.args.get("goal", type=int)
    return _page("learning", project, **learning_pages.learning_page(project, goal if goal and goal > 0 else None))


@ui.get(f"{PROJECT}/classes")
def classes(project_id: int) -> str:
    """Difficulty beside AP."""
    project = _project(project_id)
    return _page("classes", project, **learning_pages.classes_page(project))


@ui.get(f"{PROJECT}/errors")
def errors(project_id: int) -> str:
    """What the detector gets right and wrong on the evaluation set."""
    project, page = _project(project_id), request.args.get("page", 1, type=int)
    return _page("errors", project, **error_pages.errors_page(project, request.args, page))


@ui.get(f"{PROJECT}/queue")
def queue(project_id: int) -> str:
    """What is to be labelled next, and why."""
    project = _project(project_id)
    shown = queue_pages.queue_page(project, request.args.get("page", 1, type=int))
    return _page("queue", project, **shown, done=DONE.get(request.args.get("done", "")))


@ui.post(f"{PROJECT}/steer")
def steer(project_id: int) -> AnyResponse:
    """Pins and quotas."""
    _dashboard().tokens.check(project_id, request.form.get(FIELD, ""))
    _project(project_id)
    done = _dashboard().actions.steer(project_id, request.form)
    log.info("project %d, steered on the dashboard: %s", project_id, done.text)
    page = request.form.get("page", 1, type=int)
    said = "steer" if done.round_number is not None else "unsteered"
    return redirect(url_for("ui.queue", project_id=project_id, page=max(1, page), done=said), code=303)


@ui.get(f"{PROJECT}/similar")
def similar(project_id: int) -> str:
    """The pool's images like some of its tasks, or like one box of one."""
    project, tasks = _project(project_id), request.args.getlist("task", type=int)
    return _page("similar", project, **similar_pages.similar_page(project, tasks, request.args.get("box", type=int)))


@ui.get(f"{PROJECT}/approve")
def approve(project_id: int) -> str:
    """Pre-annotations to approve together."""
    project, at = _project(project_id), request.args.get("at", approve_pages.USUAL, type=float)
    shown = approve_pages.approve_page(project, at, request.args.get("page", 1, type=int))
    return _page("approve", project, **shown, done=DONE.get(request.args.get("done", "")))


@ui.post(f"{PROJECT}/approve")
def approve_these(project_id: int) -> AnyResponse:
    """Approves what is ticked."""
    _dashboard().tokens.check(project_id, request.form.get(FIELD, ""))
    done = _dashboard().actions.approve(project_id, request.form)
    log.info("project %d, on the dashboard: %s", project_id, done.text)
    said = "approve-none" if not done.tasks else "approve-some" if done.left else "approve"
    at = request.form.get("at", approve_pages.USUAL, type=float)
    return redirect(url_for("ui.approve", project_id=project_id, at=f"{at:g}", done=said), code=303)


@ui.post(f"{PROJECT}/undo-approval")
def undo_approval(project_id: int) -> AnyResponse:
    """Takes a batch back."""
    _dashboard().tokens.check(project_id, request.form.get(FIELD, ""))
    done = _dashboard().actions.undo_approval(project_id, request.form.get("batch", 0, type=int))
    log.info("project %d, on the dashboard: %s", project_id, done.text)
    said = "undo-some" if done.changed else "undo"
    return redirect(url_for("ui.approve", project_id=project_id, done=said), code=303)


@ui.get(f"{PROJECT}/rounds/<int(max={LARGEST_PROJECT_ID}):number>/map")
def map_points(project_id: int, number: int) -> AnyResponse:
    """The points of the map on the page before."""
    response = jsonify(queue_pages.map_points(_project(project_id), number))
    response.cache_control.private, response.cache_control.no_cache = True, True
    response.add_etag()
    return response.make_conditional(request)


@ui.get(f"{PROJECT}/quality")
def quality(project_id: int) -> str:
    """What is worth a second look, and what pre-annotations saved."""
    project, page = _project(project_id), request.args.get("page", 1, type=int)
    return _page("quality", project, **quality_pages.quality_page(project, page, request.args))


@ui.post(f"{PROJECT}/dismiss")
def dismiss(project_id: int) -> AnyResponse:
    """Somebody has looked at the doubts about a task and found none, or doubts them again."""
    _dashboard().tokens.check(project_id, request.form.get(FIELD, ""))
    project, task_id = _project(project_id), request.form.get("task", 0, type=int)
    words = quality_pages.Doubts.of(request.form)
    if words.dismissed:
        project.runtime.store.dismissals.take_back(project_id, task_id)
    elif task_id > 0:
        project.runtime.store.dismissals.add(project_id, task_id, request.form.get("boxes", "")[:64])
    page = max(1, request.form.get("page", 1, type=int))
    query = words.address(page=page if page > 1 else "")
    return redirect(url_for("ui.quality", project_id=project_id) + (f"?{query}" if query else ""), code=303)


@ui.get(f"{PROJECT}/settings")
def settings(project_id: int) -> str:
    """Settings in force and where each came from."""
    project = _project(project_id)
    return _page("settings", project, **origins.settings_page(project))


@ui.get(f"{PROJECT}/rounds/<int(max={LARGEST_PROJECT_ID}):number>/images/<int:task_id>")
def image(project_id: int, number: int, task_id: int) -> Response:
    """The image of a task in a round's pool, as the detector saw it."""
    path = _project(project_id).image_file(number, task_id)
    response = send_file(path, mimetype=IMAGE_TYPES[path.suffix], conditional=True, max_age=IMAGE_AGE_S)
    response.cache_control.public, response.cache_control.private = False, True
    return response


@ui.get(f"{PROJECT}/rounds/<int(max={LARGEST_PROJECT_ID}):number>/thumbnails/<int:task_id>")
def thumbnail(project_id: int, number: int, task_id: int) -> Response:
    """The same, small."""
    path = _project(project_id).image_file(number, task_id)
    response = Response(queue_pages.small_jpeg(path), mimetype="image/jpeg")
    response.cache_control.private, response.cache_control.max_age = True, IMAGE_AGE_S
    return response


@ui.post(f"{PROJECT}/<any(train, cancel, pause, resume, retry, rollback, detector):action>")
def press(project_id: int, action: str) -> AnyResponse:
    """A button."""
    _dashboard().tokens.check(project_id, request.form.get(FIELD, ""))
    _project(project_id)
    actions = _dashboard().actions
    if action == "rollback":
        said = actions.roll_back(project_id, request.form.get("version", ""))
    elif action == "detector":
        said = actions.choose_detector(project_id, request.form.get("detector", ""))
    else:
        said = getattr(actions, action)(project_id)
    log.info("project %d, %s on the dashboard: %s", project_id, action, said)
    return redirect(url_for("ui.now", project_id=project_id, done=action), code=303)


@ui.errorhandler(PPALError)
def refused(error: PPALError) -> tuple[str, int]:
    """An expected error as a page."""
    log.info("refused: %r", str(error))
    return render_template("ppal/problem.html", text=str(error)), status_of(error)


@ui.errorhandler(HTTPException)
def not_served(error: HTTPException) -> tuple[str, int] | AnyResponse:
    """A wrong address or method as a page."""
    if error.code is None or error.code < 400:
        return error.get_response()
    return render_template("ppal/problem.html", text=error.description or error.name), error.code


@ui.after_request
def with_policy(response: Response) -> Response:
    """Style, script and images of our own and nothing else."""
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["Referrer-Policy"] = "same-origin"
    return response


def as_time(value: datetime | None) -> str:
    """A stored time, which is UTC."""
    return f"{value:%Y-%m-%d %H:%M} UTC" if value is not None else ""


@ui.app_template_filter("ppal_local_time")
def as_local_time(value: datetime | None) -> Markup | str:
    """A stored time, which a script turns into the reader's own."""
    if value is None:
        return ""
    return Markup('<time datetime="{}">{}</time>').format(f"{value:%Y-%m-%dT%H:%M:%SZ}", as_time(value))


@ui.app_template_filter("ppal_sentence")
def as_sentence(text: str) -> Markup:
    """A text with a capital letter and a full stop; what stands between backticks is code."""
    parts = (text[:1].upper() + text[1:].rstrip(".") + "." if text else "").split("`")
    code, end = Markup("<code>"), Markup("</code>")
    return Markup("").join(code + part + end if n % 2 else escape(part) for n, part in enumerate(parts))


@ui.app_template_filter("ppal_next_try")
def as_next_try(finding: Finding) -> str:
    """When the backend tries again by itself."""
    return next_try(finding)


@ui.app_template_filter("ppal_seconds")
def as_seconds(value: float) -> str:
    """What an image takes, in seconds or, from two minutes on, in minutes."""
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


@ui.app_template_filter("ppal_map")
def as_map(value: float | None) -> str:
    """An mAP or AP."""
    return map_text(value)


@ui.app_template_filter("ppal_percent")
def as_percent(share: float) -> str:
    """A share in [0, 1]; the sign never stands on the next line."""
    return percent(share).replace(" ", "\u00a0")


@ui.app_template_filter("ppal_count")
def as_count(number: int, thing: str, things: str = "") -> str:
    """A number of things, in the singular for one."""
    return count(number, thing, things)


@ui.app_template_filter("ppal_gain")
def as_gain(value: float) -> str:
    """A difference of two."""
    return signed(value)


@ui.app_template_filter("ppal_figure")
def as_figure(metrics: Mapping[str, Any]) -> str:
    """A round's mAP, where there is enough to tell one."""
    return Quality.of(metrics).figure


@ui.app_template_filter("ppal_span")
def as_span(seconds: float | None) -> str:
    """A time span in words, rounded to what people want to know."""
    return "unknown" if seconds is None else now_pages.span(seconds)
