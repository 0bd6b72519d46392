"""Every page, over rounds that the real step line made."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from pydantic import SecretStr

from ppal_backend.rounds.folder import RoundFolder
from ppal_backend.store import Lease, SeenAnnotation
from ppal_backend.store.tables import RoundRow
from tests.place import CONFIG
from tests.service.dashboard.conftest import PASSWORD, TOKEN, ShownPlace

PAGES = ["", "projects/1/", "projects/1/live", "projects/1/learning", "projects/1/classes", "projects/1/errors",
         "projects/1/queue", "projects/1/quality", "projects/1/settings", "projects/1/rounds/5/map"]  # fmt: skip
HUGE = 10**30


def text_of(answer):
    """What people read, in one line."""
    assert answer.status_code == 200, answer.text
    return " ".join(re.sub(r"<[^>]+>", " ", answer.text).split())


def in_gallery(page):
    """Tasks of the gallery, in order."""
    return [int(t) for t in re.findall(r'<h2><span class="place">\d+</span> <a [^>]+>Task (\d+)</a>', page)]


@pytest.mark.parametrize("page", PAGES)
def test_pages_ask_for_the_login_of_the_api(trained, page):
    client = trained.app(basic_auth_user="op", basic_auth_pass=SecretStr(PASSWORD)).test_client()
    assert client.get(f"/ui/{page}").status_code == 401
    answer = client.get(f"/ui/{page}", auth=("op", PASSWORD))
    assert answer.status_code == 200
    assert TOKEN not in answer.text and PASSWORD not in answer.text, "a secret is on the page"
    assert client.get("/ui/static/ppal.css").status_code == 401


@pytest.mark.parametrize("page", PAGES)
def test_pages_run_nothing_of_others_and_hold_nothing_inline(client, page):
    answer = client.get(f"/ui/{page}")
    policy = answer.headers["Content-Security-Policy"]
    for part in (
        "default-src 'none'",
        "frame-ancestors 'none'",
        "style-src 'self'",
        "script-src 'self'",
        "img-src 'self'",
    ):
        assert part in policy, "the page would be bare, or open to others"
    assert "unsafe" not in policy
    assert not re.search(r'<style|\sstyle=|\son\w+="|<script(?! src="/ui/static/)|="//|src="http', answer.text)


def test_the_overview_tells_what_each_project_is_at(client):
    text = text_of(client.get("/ui/"))
    assert "Project 1 cat, dog" in text and "idle" in text
    assert "mAP 0.530 (0.480 to 0.570), measured on 12 images and 2 of 3 classes." in text
    assert "The next training starts by itself after 5 more annotations." in text


def test_now_lists_the_rounds_before_newest_first(client):
    text = text_of(client.get("/ui/projects/1/"))
    assert "No round is running" in text and "5 start a round by themselves: 5 to go" in text
    row = r'<tr><th scope="row">(\d)</th>.*?class="n">([\d.]*)</td><td class="n">(\d+)'
    rows = re.findall(row, client.get("/ui/projects/1/").text)
    assert rows == [("5", "0.530", "50"), ("4", "0.510", "40"), ("3", "0.481", "30"), ("2", "0.432", "20"),
                    ("1", "0.321", "10")]  # fmt: skip


def test_now_shows_the_running_round_its_log_and_what_hinders(place):
    place.train()
    record = place.store.rounds.request(1, "train", "five <b>new</b> annotations")
    place.store.rounds.claim(1, Lease.mine())
    folder = RoundFolder(place.folder(2))
    folder.mark_done("export", 3.0, {})
    (folder / "train").mkdir()
    (folder / "train" / "train.log").write_text(f"first\nloss 0.5 token {TOKEN}\n")
    place.store.rounds.report(record.id, "dataset", {"done": 3, "total": 12, "detail": "images"})
    place.store.projects.set_problem(1, "webhook", "the webhook is missing")
    place.store.ledger.see(1, [SeenAnnotation(900, 5)])
    page = place.app().test_client().get("/ui/projects/1/")
    text = text_of(page)
    assert "Round 2 running" in text and "five &lt;b&gt;new&lt;/b&gt; annotations" in text
    assert "Read the annotations 3 s" in text and "3 of 12 · images" in text and 'value="3"' in page.text
    assert "the webhook is missing" in text and "no worker runs on this state database" in text
    assert "first\nloss 0.5 token [secret]" in page.text
    assert text_of(place.app().test_client().get("/ui/")).count("round 2: dataset") == 1


def test_learning_shows_every_version_on_the_same_images_and_the_forecast(client):
    text = text_of(client.get("/ui/projects/1/learning"))
    assert "mAP 0.530 (0.480 to 0.570), measured on 12 images and 2 of 3 classes." in text
    assert "Cannot tell whether it is better or worse than round 4&#39;s on the same images: +0.020" in text
    assert "Not measured, for want of 5 boxes in 3 of these images: emu (2)." in text
    assert (
        "round 1: mAP 0.321 (0.271 to 0.361) with 10 images, 10 boxes" in text
        and "round 5: mAP 0.530 (0.480 to 0.570) with 50 images" in text
    )
    assert "The dashed curve is a power law" in text and "fitted to 5 versions" in text
    found = re.search(r"After the next 5 images mAP is expected at ([\d.]+) \(([\d.]+) to ([\d.]+)\)", text)
    low, high = float(found[2]), float(found[3])
    assert low < 0.7 - 1.2 * 55**-0.5 < high
    assert "label on Budget. 50 of 80 images are labelled, 30 are left." in text
    assert "dog 0.221 0.430 +0.020 cat 0.421 0.630 +0.020" in text
    assert "go on: budget, plateau, uncertainty left" in text and "0 of 3 criteria would stop" in text
    full = text_of(client.get("/ui/projects/1/learning?goal=50"))
    assert "could stop Budget. 50 of the 50" in full and "1 of 3 criteria would stop" in full


def test_learning_shows_how_far_each_map_may_be_off(client):
    answer = client.get("/ui/projects/1/learning")
    page, text = answer.text, text_of(answer)
    assert page.count('class="measured"') == 2 and page.count('class="whisker"') == 10, "on both charts"
    assert "0.530 0.480 to 0.570 12" in text and "0.321 0.271 to 0.361 12" in text, "in the table"


def test_an_map_is_one_kind_of_number_on_every_page(client):
    """From 0 to 1 with three decimals: the page said 0.125 here and 15.5 there."""
    for page in PAGES:
        text = text_of(client.get(f"/ui/{page}"))
        text = re.sub(r"(80 % of forecasts|95 ?% )", "", text)  # levels of intervals, in titles and a table's head
        figures = re.findall(r"\bmAP (?:is expected at |of )?([+−]?\d[\d.]*\d)( ?%)?", text)
        assert [f for f in figures if not re.fullmatch(r"[+−]?[01]\.\d{3}", f[0]) or f[1]] == [], page
        assert "mAP points" not in text, page
    learning = text_of(client.get("/ui/projects/1/learning"))
    assert len(re.findall(r"\bmAP (?:is expected at )?[01]\.\d{3}", learning)) >= 10, "it found the figures"


def test_few_images_have_no_headline_no_line_and_no_forecast(place):
    place.world.evaluated = 4
    place.train(5)
    answer = place.app().test_client().get("/ui/projects/1/learning")
    assert "Measured on 4 images: too few to tell; 36 more come by themselves." in text_of(answer)
    assert "<svg" not in answer.text and "0.530" not in answer.text and "expected at" not in answer.text
    now = text_of(place.app().test_client().get("/ui/projects/1/"))
    assert "Measured on 4 images: too few to tell" in now and "0.530" not in now


def test_versions_measured_on_other_images_are_shown_apart(place):
    place.train(3)
    for record in place.store.rounds.of_project(1)[:1]:
        old = {k: v for k, v in record.metrics.items() if k not in ("measured", "image_set", "earlier")}
        with place.store.database.transaction() as session:
            session.get(RoundRow, record.id).metrics = old
    for record in place.store.rounds.of_project(1)[1:]:
        with place.store.database.transaction() as session:
            session.get(RoundRow, record.id).metrics = {**record.metrics, "earlier": {}}
    answer = place.app().test_client().get("/ui/projects/1/learning")
    assert "round 1: mAP 0.321 with 10 images, 10 boxes, on other images" in text_of(answer)
    assert 'class="elsewhere"' in answer.text and "Hollow points were measured on other images" in text_of(answer)


def test_with_too_few_rounds_there_is_no_forecast_but_a_reason(place):
    place.train(2)
    text = text_of(place.app().test_client().get("/ui/projects/1/learning"))
    assert "No forecast yet. A curve with three unknowns needs at least 4 versions" in text and "power law" not in text
    assert "cannot tell Plateau." in text


def test_classes_show_difficulty_ap_weight_and_count(client):
    text = text_of(client.get("/ui/projects/1/classes"))
    assert "hard dog : at least 0.1 harder" in text or "hard dog: at least 0.1 harder" in text
    assert "dog hard 0.900 0.430 1.194 25" in text and "cat 0.200 0.630 1.111 25" in text
    assert text.index("dog hard 0.900") < text.index("cat 0.200"), "the hardest come first"


def test_the_queue_comes_in_order_with_reasons_boxes_and_links(client, trained):
    query = RoundFolder(trained.folder(5)).read("query_set.json")
    page = client.get("/ui/projects/1/queue").text
    tasks = in_gallery(page)
    assert tasks == query["queue"][:12]
    assert f"http://ls.test:8080/projects/1/data?task={tasks[0]}" in page
    assert (
        f'src="/ui/projects/1/rounds/5/images/{tasks[0]}"' in page
        and page.count("Not sure of") + page.count("Not sure:") >= 3
    )
    chosen = [t for t in tasks[:5] if t not in query["to_evaluate"]]
    assert 0 < len(chosen) < 5 and page.count("Picked at random to measure the detector") >= 5 - len(chosen)
    assert page.count('class="counts k') == sum(len(query["explanations"][str(t)]["boxes"]) for t in chosen)
    last = client.get("/ui/projects/1/queue?page=99").text
    assert in_gallery(last) == query["queue"][24:] and 'id="map"' not in last, "the map is on the first page"


def test_credentials_in_the_address_of_label_studio_are_in_no_link(trained):
    client = trained.app(label_studio_url="http://me:hidden-word@ls.test:8080/studio").test_client()
    for page in PAGES:
        assert "hidden-word" not in client.get(f"/ui/{page}").text, page
    assert 'href="http://ls.test:8080/studio/projects/1/data?task=' in client.get("/ui/projects/1/queue").text


def test_images_come_from_the_cache_and_from_nowhere_else(place, tmp_path):
    place.train()
    client = place.app().test_client()
    url = "/ui/projects/1/rounds/1/images/1003"
    answer = client.get(url)
    assert answer.mimetype == "image/png" and answer.data.startswith(b"\x89PNG")
    assert "private" in answer.headers["Cache-Control"] and "public" not in answer.headers["Cache-Control"]
    folder = RoundFolder(place.folder(1))
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    pool = folder.read("dataset/pool.json")
    cache = tmp_path / "data" / "images"
    for path in (tmp_path / "secret.png", cache / ".." / ".." / "secret.png", cache / "link.png", cache / "gone.png",
                 tmp_path / "data" / "ppal.db"):  # fmt: skip
        folder.write("dataset/pool.json", [{**e, "path": str(path)} for e in pool])
        assert client.get(url).status_code == 404, path
    assert client.get("/ui/projects/1/rounds/1/images/77").status_code == 404, "a task of no pool"


def test_a_project_without_rounds_has_all_its_pages(place):
    client = place.app().test_client()
    assert "No training is done yet: one starts by itself after 5 new annotations" in text_of(
        client.get("/ui/projects/1/learning")
    )
    assert "before the first training" in text_of(client.get("/ui/projects/1/classes"))
    assert "No queue is published yet" in text_of(client.get("/ui/projects/1/queue"))
    assert "None yet" in text_of(client.get("/ui/projects/1/"))


def test_before_the_first_training_all_pages_show_round_0(place):
    """Its number is 0 and its version has a model that no training made."""
    place.store.projects.connect(1, "1.1", CONFIG, "http://ls.test:8080", {"detector": "yolox_nano"})
    place.world.labelled = 0
    place.store.rounds.request(1, "rank", "the project was connected", as_is=True)
    place.run()
    (record,) = place.store.rounds.of_project(1)
    (version,) = place.versions()
    assert (record.number, record.state) == (0, "done") and version.startswith("ppal-r0-")
    client = place.app().test_client()
    pages = {
        name: client.get(f"/ui/projects/1/{name}")
        for name in ("", "learning", "classes", "queue", "quality", "settings")
    }
    assert {answer.status_code for answer in pages.values()} == {200}
    assert "<li>cat: from `cat` (same name)</li>" in pages[""].text and "no box" not in pages[""].text
    assert "before the first training" in pages["classes"].text
    queue = pages["queue"].text
    assert "/ui/projects/1/rounds/0/" in queue and "there was no model yet" not in queue
    assert client.get("/ui/projects/1/live").status_code == 200


def test_before_the_first_model_the_queue_says_that_it_is_random(place):
    place.round("rank")
    text = text_of(place.app().test_client().get("/ui/projects/1/queue"))
    assert "Drawn at random: there was no model yet." in text and "strategy random" in text
    assert "Uncertainty" not in text, "nothing measured it"


def test_pruned_rounds_keep_their_points_and_lose_only_images(place):
    place.train(2)
    for name in ("dataset", "detections"):
        shutil.rmtree(place.folder(2) / name)
    client = place.app().test_client()
    assert "no image on disk" in text_of(client.get("/ui/projects/1/queue"))
    assert "dog hard 0.900" in text_of(client.get("/ui/projects/1/classes"))


def test_what_is_wrong_is_a_page_in_words(client, place):
    answer = client.get("/ui/projects/99/")
    assert answer.status_code == 404 and "project 99 is not connected" in answer.text and "<html" in answer.text
    place.train()
    (place.folder(1) / "query_set.json").write_text("{broken")
    answer = place.app().test_client().get("/ui/projects/1/queue")
    assert answer.status_code == 404 and "damaged file" in answer.text


@pytest.mark.parametrize("project_id", [1, HUGE])
def test_no_address_breaks_a_page(client, project_id):
    for page in ("", "queue?page=-5", f"queue?page={HUGE}", "learning?goal=x", f"learning?goal={HUGE}", "nothing",
                 f"quality?page={HUGE}", f"rounds/{HUGE}/images/1", f"rounds/1/images/{HUGE}",
                 f"rounds/{HUGE}/map", f"rounds/1/thumbnails/{HUGE}", "rounds/99/map"):  # fmt: skip
        assert client.get(f"/ui/projects/{project_id}/{page}").status_code in (200, 404), page


@pytest.mark.parametrize(
    ("config", "options", "trouble"),
    [("<View/>", {}, "RectangleLabels"), (CONFIG, {"budget": -1}, "budget: Input should be")],
)
def test_a_project_with_a_broken_config_does_not_hide_the_others(place, config, options, trouble):
    place.store.projects.connect(2, "2.1", config, "http://ls.test:8080", options)
    text = text_of(place.app().test_client().get("/ui/"))
    assert "Project 1 cat, dog" in text and "Project 2" in text and trouble in text


def test_no_page_loads_torch(trained):
    code = f"""
import sys
from dataclasses import replace
from tests.service.conftest import FakeImages, FakePredictor, RecordingJobs
from ppal_backend.service.app import create_app
from ppal_backend.settings import load_settings
app = create_app(load_settings(MODEL_DIR={str(trained.settings.model_dir)!r}), jobs=RecordingJobs(),
                 predictor=FakePredictor(), images=FakeImages(None))
client = app.test_client()
assert all(client.get("/ui/" + page).status_code == 200 for page in {PAGES!r})
loaded = {{"torch", "mmdet", "scipy", "matplotlib"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_learning_page_tells_tiles_and_why(place):
    plain = place.world.train

    def train(*args):
        decided = plain(*args)
        return replace(decided, facts={**decided.facts, "slices": 416, "why_slices": "boxes are < small"})

    place.world.train = train
    place.train()
    page = place.app().test_client().get("/ui/projects/1/learning")
    assert "in tiles of 416 px" in text_of(page) and "boxes are &lt; small." in page.text
    place.world.train = plain
    place.train()
    assert "tiles" not in text_of(place.app().test_client().get("/ui/projects/1/learning"))


def test_how_versions_did_before_the_labels_is_a_curve_of_its_own(place):
    place.train(2)
    names = place.versions()
    counts = {"tasks": 12, "kept": 30, "moved": 5, "relabelled": 5, "removed": 0, "added": 10}
    prepare = place.world.prepare
    report = {"agreement": {names[0]: counts, names[1]: {**counts, "tasks": 9}, "ppal-older": counts}}
    place.world.prepare = lambda *given: replace(prepare(*given), report=report)
    place.train()
    answer = place.app().test_client().get("/ui/projects/1/learning")
    text = text_of(answer)
    assert f"{names[0]}: 60 % of boxes right as shown, on 12 images" in text
    assert f"{names[1]}: " not in text and "ppal-older" not in text, "nine images tell nothing"
    assert "Right before they were labelled: hard images" in text and "this is no measure of the detector" in text


def test_without_pre_annotations_there_is_no_such_curve(client):
    assert "Before they were labelled" not in text_of(client.get("/ui/projects/1/learning"))


def test_the_queue_says_where_the_published_front_ends(make_place):
    place = make_place(ShownPlace, publish_tasks=1)  # four budgets of 5
    place.train()
    page = text_of(place.app().test_client().get("/ui/projects/1/queue"))
    assert "Label Studio has the first 20 of 30 tasks with their places and boxes" in page


def test_a_queue_that_is_published_whole_says_nothing_of_a_front(client):
    assert "Label Studio has the first" not in text_of(client.get("/ui/projects/1/queue"))
