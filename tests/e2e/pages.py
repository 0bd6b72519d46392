"""Label Studio's own pages as a person uses them: what is clicked, and what the screen says then."""

from dataclasses import dataclass
from urllib.parse import urlsplit

PATIENCE_MS = 180_000
DRAWN = "Konva.stages.reduce((n, stage) => n + stage.find('Rect').length, 0)"


@dataclass(frozen=True)
class Shown:
    """A task on the labeling screen: boxes drawn on the image, and the listed ones as (label, score)."""

    id: int
    boxes: int
    listed: list[tuple[str, str]]


class Pages:
    """A person's browser tab in one Label Studio.

    Args:
        page: a page of Playwright.
        server: the running Label Studio.
        pictures: folder for screenshots; those of the documentation are copies of them.
    """

    def __init__(self, page, server, pictures):
        self.page, self.server, self.pictures = page, server, pictures
        page.set_default_timeout(PATIENCE_MS)

    def sign_in(self):
        self._open("/user/login/")
        self.page.fill("input[name=email]", self.server.username)
        self.page.fill("input[name=password]", self.server.password)
        self.page.get_by_role("button", name="Log in").click()
        self.page.wait_for_url(lambda url: "/user/login" not in url, wait_until="commit")

    def connect(self, project_id, url, password="", extra_params=""):
        """Fill in Settings > Model > Connect Model and save it; the status of Label Studio's answer."""
        self._open(f"/projects/{project_id}/settings/ml")
        self.page.get_by_text("Connect Model").first.click()
        form = self.page.locator("form[action=addMLBackend]")
        form.locator("[name=title]").fill("PPAL")
        form.locator("[name=url]").fill(url)
        if password:
            form.get_by_test_id("select-trigger-auth_method-NONE").click()
            self.page.get_by_test_id("select-option-BASIC_AUTH").click()
            form.locator("[name=basic_auth_user]").fill("label-studio")
            form.locator("[name=basic_auth_pass]").fill(password)
        form.locator("[name=extra_params]").fill(extra_params)
        with self.page.expect_response(lambda r: r.request.method == "POST" and path_of(r.url) == "/api/ml") as answer:
            form.get_by_text("Validate and Save").click()
        return answer.value.status

    def problem(self):
        """The text of the window that tells a failure."""
        window = self._window("Runtime error").last  # the form, whose text holds the same error, lies below
        window.wait_for()
        return " ".join(window.inner_text().split())

    def model_card(self):
        """The text of the model's card under Settings > Model."""
        card = self.page.locator(".lsf-backend-card")
        card.wait_for()
        return " ".join(card.inner_text().split())

    def start_training(self, project_id):
        """Press Start Training in the card's menu and in the window that asks again; what the window says then."""
        self._open(f"/projects/{project_id}/settings/ml")
        self.page.get_by_role("button", name="Machine learning model options").click()
        item = self.page.get_by_text("Start Training", exact=True)
        item.wait_for()
        self.picture("model")
        item.click()
        window = self._window("Start Model Training")
        window.get_by_role("button", name="Start Training").click()
        window.get_by_text("Request Sent!").wait_for()
        return " ".join(window.inner_text().split())

    def versions(self, project_id):
        """The text of Settings > Predictions, which lists the versions."""
        self._open(f"/projects/{project_id}/settings/predictions")
        self.page.get_by_text("Last prediction created").first.wait_for()
        return self.page.locator("body").inner_text()

    def tab(self, project_id, title):
        """Open a tab of the Data Manager; its columns, and the texts of the rows that fit on the screen."""
        views = self.server.session.get("/api/dm/views", params={"project": project_id})
        view = next(view["id"] for view in views if view["data"]["title"] == title)
        self._open(f"/projects/{project_id}/data")
        with self.page.expect_response(lambda r: path_of(r.url) == "/api/tasks" and f"view={view}&" in r.url + "&"):
            self.page.get_by_text(title).first.click()
        rows = self.page.get_by_test_id("table-row")
        rows.first.wait_for()
        columns = self.page.locator(".lsf-table-head [data-id]").evaluate_all("all => all.map(e => e.dataset.id)")
        cells = "rows => rows.map(row => [...row.querySelectorAll('.lsf-table__cell')].map(cell => cell.innerText))"
        return columns, [[text for text in row if text] for row in rows.evaluate_all(cells)]

    def predictions_of(self, project_id, task_id):
        """Open a task from the list; what the screen says of each annotation and prediction of it."""
        self._open(f"/projects/{project_id}/data?task={task_id}")
        self.page.locator(".lsf-annotation-button__info", has_text="%").first.wait_for()
        buttons = self.page.locator(".lsf-annotation-button").all_inner_texts()
        return [" ".join(text.split()) for text in buttons]

    def label_all_tasks(self, project_id):
        """Press Label All Tasks; the task that Label Studio serves."""
        self._open(f"/projects/{project_id}/data")
        with self._served() as answer:
            self.page.get_by_text("Label All Tasks").first.click()
        return self._shown(answer.value.json())

    def submit(self):
        """Press Submit; the next task that is served."""
        with self._served() as answer:
            self.page.get_by_role("button", name="Submit current annotation").click()
        return self._shown(answer.value.json())

    def picture(self, name):
        """Keep what the screen shows."""
        self.page.screenshot(path=self.pictures / f"label-studio-{name}.png")

    def _shown(self, task):
        """The served task once its boxes are on the screen."""
        self.page.wait_for_function("id => String(window.Htx?.task?.id) === String(id)", arg=task["id"])
        self.page.get_by_role("button", name="Submit current annotation").wait_for()
        expected = max(len(prediction["result"]) for prediction in task["predictions"])
        self.page.wait_for_function(f"n => window.Konva && Konva.stages.length && {DRAWN} >= n", arg=expected)
        texts = self.page.locator(".lsf-outliner-item").evaluate_all("all => all.map(e => e.innerText.split('\\n'))")
        return Shown(task["id"], self.page.evaluate(DRAWN), [(label, score) for _, label, score in texts])

    def _served(self):
        return self.page.expect_response(
            lambda r: path_of(r.url) == "/api/dm/actions" and "id=next_task" in r.url and r.ok
        )

    def _open(self, path):
        self.page.goto(self.server.url + path, wait_until="domcontentloaded")

    def _window(self, text):
        return self.page.locator(".lsf-modal-ls__content", has_text=text)


def path_of(url):
    return urlsplit(url).path.rstrip("/")
