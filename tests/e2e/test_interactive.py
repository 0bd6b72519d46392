"""Rough boxes and clicks through Label Studio's own editor, with a real round behind them."""

import subprocess
import sys
from pathlib import Path

import pytest

from ppal_backend.rig.backend import Backend
from ppal_backend.rounds.detections_store import read_boxes
from ppal_backend.structures.detections import pairwise_iou
from tests.e2e.pages import Pages, path_of
from tests.e2e.test_loop import round_folder

CHROMIUM = Path("/usr/bin/chromium")
IMAGES, LABELLED, ROUND_TIMEOUT_S = 20, 8, 300
NOISE = (-0.12, 0.08, 0.1, -0.07)  # of the box's sides, left, top, right and bottom: a hasty hand

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs Debian's package chromium"),
]


def smart_config(labels):
    rows = "".join(f'<Label value="{label}"/>' for label in labels)
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image" smart="true">{rows}</RectangleLabels>'
        '<KeyPoint name="point" toName="image" smart="true"/></View>'
    )


class Site:
    """A project whose connection ``ppal connect`` made, with a trained round, and what that round detected."""

    def __init__(self, label_studio, backend, truth):
        from ppal_backend.demo.annotator import ScriptedAnnotator

        self.label_studio, self.labels = label_studio, truth.labels
        self.id = label_studio.create_project("interactive", smart_config(truth.labels))
        paths = label_studio.import_images(self.id, list(truth.paths().values())[:IMAGES])
        by_path = truth.truths_by_path()
        annotator = ScriptedAnnotator(
            label_studio.url, label_studio.token, self.id, {t: by_path[p] for t, p in paths.items()}
        )
        command = [sys.executable, "-m", "ppal_backend.cli", "connect", label_studio.url, "--project", str(self.id)]
        environment = {**backend._environment, "PPAL_PUBLIC_URL": backend.url}
        subprocess.run([*command, "--backend", backend.url], env=environment, check=True, capture_output=True)
        backend.wait_for_round(self.id, 1, ROUND_TIMEOUT_S)
        annotator.label(LABELLED)
        done = backend.wait_for_round(self.id, 2, ROUND_TIMEOUT_S)
        self.seen = read_boxes(round_folder(backend, self.id, done.number) / "detections", paths)
        self.version = backend.store.versions.active(self.id)
        self.sizes = {task: (by_path[path].width, by_path[path].height) for task, path in paths.items()}

    def clear_detections(self, task_id, count):
        """The surest detections of a task that lie apart: corners in percent, label."""
        width, height = self.sizes[task_id]
        scale = 100 / width, 100 / height, 100 / width, 100 / height
        chosen = []
        for box in sorted(self.seen.get(task_id, ()), key=lambda box: -box.score):
            corners = tuple(min(max(n * s, 0.0), 100.0) for n, s in zip(box.box_xyxy, scale, strict=True))
            big = corners[2] - corners[0] > 6 and corners[3] - corners[1] > 6
            if big and box.score >= 0.05 and all(overlap(corners, other) < 0.05 for other, _ in chosen):
                chosen.append((corners, self.version.labels[box.class_index]))
        return chosen[:count]


def overlap(a, b):
    import numpy as np

    return float(pairwise_iou(np.array([a]), np.array([b]))[0, 0])


class Editor:
    """The editor with Auto-Annotation and Auto-Accept Suggestions on."""

    def __init__(self, pages, site, task_id):
        self.page, self.site = pages.page, site
        pages._open(f"/projects/{site.id}/data?task={task_id}")
        self.page.wait_for_function("id => String(window.Htx?.task?.id) === String(id)", arg=task_id)
        self.page.wait_for_function("window.Konva && Konva.stages.length > 0")
        self.page.get_by_text("Auto-Annotation", exact=True).click()
        self.page.get_by_text("Auto-Accept Suggestions", exact=True).click()
        self.page.wait_for_function("Htx.autoAnnotation && Htx.autoAcceptSuggestions")
        self.page.get_by_role("button", name="Create an annotation").click()
        self.page.wait_for_function("Htx.annotationStore.selected.type === 'annotation'")

    def tool(self, control):
        """Take the smart tool of a control."""
        self.page.evaluate(
            """name => {
              const image = Htx.annotationStore.selected.objects.find(o => o.type === 'image');
              const tools = image.getToolsManager();
              tools.selectTool(tools.allTools().find(t => t.dynamic && t.control.name === name), true);
            }""",
            control,
        )

    def ready(self, control, label):
        """The tool with a label chosen and no region selected, as somebody makes it before the next box."""
        self.page.evaluate("Htx.annotationStore.selected.unselectAll()")
        self.tool(control)
        chosen = "Htx.annotationStore.selected.names.get('label').selectedLabels.map(l => l.value)"
        if self.page.evaluate(chosen) != [label]:
            self.page.locator(".lsf-label").filter(has_text=label).first.click()
        self.page.wait_for_function(f"label => {chosen}.join() === label", arg=label)

    def clear(self):
        """Delete all regions: a click on one selects it."""
        self.page.evaluate("Htx.annotationStore.selected.deleteAllRegions()")
        self.page.wait_for_function("Htx.annotationStore.selected.serializeAnnotation().length === 0")

    def _point(self, x_pct, y_pct):
        frame = self.page.evaluate(
            """() => { const image = Htx.annotationStore.selected.objects.find(o => o.type === 'image');
              const at = Konva.stages[0].container().getBoundingClientRect();
              return [at.left, at.top, image.stageWidth, image.stageHeight]; }"""
        )
        return frame[0] + x_pct / 100 * frame[2], frame[1] + y_pct / 100 * frame[3]

    def _answered(self):
        return self.page.expect_response(lambda r: path_of(r.url).endswith("/interactive-annotating"))

    def draw(self, corners):
        """Drag a rough box; what Label Studio got for it."""
        start, end = self._point(*corners[:2]), self._point(*corners[2:])
        with self._answered() as answer:
            self.page.mouse.move(*start)
            self.page.mouse.down()
            self.page.mouse.move(*[(a + b) / 2 for a, b in zip(start, end, strict=True)], steps=3)
            self.page.mouse.move(*end, steps=3)
            self.page.mouse.up()
        return self._taken(answer)

    def click(self, x_pct, y_pct):
        with self._answered() as answer:
            self.page.mouse.click(*self._point(x_pct, y_pct))
        return self._taken(answer)

    def _taken(self, answer):
        body = answer.value.json()
        assert "errors" not in body, body
        region = body["data"]["result"][-1]  # the last one drawn; those that still wait are answered with it
        self.page.wait_for_function("id => Htx.annotationStore.selected.serializeAnnotation().some(r => r.id === id)",
                                    arg=region["id"])  # fmt: skip
        return region

    def boxes(self):
        """Corners in percent and label of every box of the annotation."""
        found = self.page.evaluate("Htx.annotationStore.selected.serializeAnnotation()")
        assert {region["type"] for region in found} <= {"rectanglelabels"}, found
        return [(corners_of(region), region["value"]["rectanglelabels"][0]) for region in found]


def corners_of(region):
    value = region["value"]
    return value["x"], value["y"], value["x"] + value["width"], value["y"] + value["height"]


@pytest.fixture(scope="module")
def site(label_studio, truth, tmp_path_factory):
    environment = {
        "START_TRAINING_EACH_N_UPDATES": str(LABELLED),
        "PPAL_DETECTOR": "retinanet_tiny",
        "PPAL_MAX_ITERATIONS": "40",
        "PPAL_POLL_INTERVAL_S": "2",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "2",
    }
    with Backend(tmp_path_factory.mktemp("backend"), label_studio.url, label_studio.token, environment) as running:
        yield Site(label_studio, running, truth)


@pytest.fixture(scope="module")
def pages(label_studio, tmp_path_factory):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        pages = Pages(
            browser.new_page(viewport={"width": 1280, "height": 850}), label_studio, tmp_path_factory.mktemp("pictures")
        )
        pages.sign_in()
        pages.page.set_default_timeout(45_000)
        yield pages
        browser.close()


def test_rough_boxes_and_clicks_become_the_rounds_detections(site, pages):
    """Five rough boxes, one place nobody detected, the same place again, and a click."""
    (row,) = site.label_studio.session.get("/api/ml", params={"project": site.id})
    assert row["is_interactive"] is True
    task = max(site.seen, key=lambda task: len(site.clear_detections(task, 5)))
    targets = site.clear_detections(task, 5)
    assert len(targets) == 5, "the round detected too little for this test"
    editor = Editor(pages, site, task)
    chosen = site.labels[0]
    for number, (corners, _) in enumerate(targets):
        editor.ready("label", chosen)
        width, height = corners[2] - corners[0], corners[3] - corners[1]
        rough = tuple(
            min(max(c + side * share, 0.0), 100.0)
            for c, side, share in zip(corners, (width, height) * 2, NOISE, strict=True)
        )
        assert overlap(rough, corners) > 0.6
        region = editor.draw(rough)
        drawn = editor.boxes()
        assert len(drawn) == number + 1, "the rough box is gone, the detector's is there"
        box, label = corners_of(region), region["value"]["rectanglelabels"][0]
        assert (pytest.approx(box, abs=0.01), label) in [(b, n) for b, n in drawn]
        assert label == chosen
        assert overlap(box, rough) >= 0.4, "never moved to another place"
        assert any(overlap(box, tuple(d)) > 0.98 for d in _detected(site, task)), "a box that the round detected"
        if number == 0:
            editor.ready("label", chosen)
            again = editor.draw(rough)
            assert again["id"] == region["id"] and len(editor.boxes()) == 1, "the next one in the place of the last one"
    pages.picture("interactive")

    editor.clear()
    tiny = _empty_place(site, task)
    editor.ready("label", chosen)
    kept = editor.draw(tiny)
    assert corners_of(kept) == pytest.approx(tiny, abs=0.6), "comes back as the mouse drew it, to its pixels"
    assert "score" not in kept
    assert len(editor.boxes()) == 1

    editor.clear()
    editor.tool("point")
    corners, label = targets[1]
    hit = editor.click((corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2)
    assert any(overlap(corners_of(hit), tuple(d)) > 0.98 for d in _detected(site, task))


def _detected(site, task):
    width, height = site.sizes[task]
    return [
        tuple(min(max(n * 100 / size, 0.0), 100.0) for n, size in zip(b.box_xyxy, (width, height) * 2, strict=True))
        for b in site.seen[task]
    ]


def _empty_place(site, task):
    """A small box that no detection overlaps by 0.3."""
    for x in range(2, 92, 3):
        for y in range(2, 92, 3):
            box = (x, y, x + 5.0, y + 5.0)
            if max(overlap(box, d) for d in _detected(site, task)) < 0.3:
                return box
    raise AssertionError("the round detected something everywhere")
