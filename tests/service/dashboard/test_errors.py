"""The page Model errors: what is counted, filtered, drawn and left out."""

import re
import shutil

import numpy as np
import pytest

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage, result_row
from ppal_backend.datasets.coco import write_predictions as keep
from ppal_backend.rounds.model_errors import Judged, Judgement
from ppal_backend.service.dashboard.errors import NONE, Filter, matrix_of
from tests.place import CONFIG
from tests.service.dashboard.test_pages import text_of

PAGE = "/ui/projects/1/errors"
TRUTH = [(1, 0, (10, 10, 40, 40)), (1, 1, (60, 60, 9, 9)), (2, 0, (0, 0, 20, 20)), (3, 1, (5, 5, 50, 50))]
FOUND = [(1, 0, 0.9, (10, 10, 40, 40)), (1, 0, 0.45, (60, 60, 9, 9)), (2, 1, 0.35, (70, 70, 20, 20)),
         (2, 1, 0.2, (0, 0, 20, 20))]  # fmt: skip


def write_round(place, truth=TRUTH, found=FOUND, images=3, number=1):
    """An evaluation set and what the detector predicted on it, as a round leaves them."""
    files = [CocoImage(i, place.world.file(i), 100, 80) for i in range(1, images + 1)]
    rows = [CocoAnnotation(n, i, c + 1, tuple(map(float, box))) for n, (i, c, box) in enumerate(truth, start=1)]
    evaluation = CocoDataset(files, rows, [CocoCategory(1, "cat"), CocoCategory(2, "dog")])
    evaluation.write(place.folder(number) / "dataset" / "val.json")
    kept = {i: [] for i in range(1, images + 1)}
    for image, c, score, box in found:
        kept[image].append(result_row(image, np.array(box, float), score, c))
    path = place.folder(number) / "evaluation" / f"{number}.npz"
    path.parent.mkdir(exist_ok=True)
    keep(path, kept, ("cat", "dog"))


@pytest.fixture
def measured(place):
    place.train()
    write_round(place)
    return place


def tasks_on(answer):
    return [int(task) for task in re.findall(r"<h3><a [^>]+>Task (\d+)</a>", answer.text)]


def test_the_page_counts_right_wrong_and_missed_and_says_what_is_left_out(measured):
    answer = measured.app().test_client().get(PAGE)
    text = text_of(answer)
    assert "on the 3 images of the evaluation set" in text and "As of round 1." in text
    assert "1 right, 2 wrong, 3 missed" in " ".join(text.replace(" ,", ",").split())
    assert "1 of the wrong ones is an object under another label, which counts as missed too" in text
    assert "shown them (0.30); 1 weaker one is left out" in text
    assert "detected as ↓ &nbsp; labelled → cat dog nothing there cat 1 1 dog 1 missed 1 1" in text
    assert tasks_on(answer) == [2, 1, 3], "the one with the most mistakes in front"
    assert "4 boxes, the images with the most in front" in text


def test_boxes_that_the_labeling_config_hides_from_annotators_do_not_count(measured):
    config = CONFIG.replace('<Label value="dog"', '<Label value="dog" model_score_threshold="0.6"')
    assert config != CONFIG
    measured.store.projects.connect(1, "1.1", config, "http://ls.test:8080", {})
    text = text_of(measured.app().test_client().get(PAGE))
    assert "shown them (0.30 to 0.60); 2 weaker ones are left out" in text
    assert "1 right, 1 wrong, 3 missed" in " ".join(text.replace(" ,", ",").split())


def test_cards_say_what_is_wrong_and_open_the_task_in_a_new_tab(measured):
    answer = measured.app().test_client().get(PAGE)
    text = text_of(answer)
    for told in (
        "Another label: cat (0.45) where dog is labelled.",
        "Wrong: dog (0.35), nothing is labelled there.",
        "Missed: cat, small.",
        "Missed: dog, medium.",
    ):
        assert told in text, told
    assert (
        '<a href="http://ls.test:8080/projects/1/data?task=2" target="_blank" rel="noopener">Task 2</a>' in answer.text
    )
    assert '<a class="frame" href="http://ls.test:8080/projects/1/data?task=2"' in answer.text
    (source,) = re.findall(r'src="(/ui/projects/1/rounds/1/images/2)"', answer.text)
    assert measured.app().test_client().get(source).mimetype == "image/png"
    frames = re.findall(r'<svg viewBox="0 0 100 80".*?</svg>', answer.text, re.S)
    assert 'class="model" x="70.0" y="70.0" width="20.0" height="20.0"' in frames[0]
    assert 'class="people doubted" x="0.0" y="0.0" width="20.0" height="20.0"' in frames[0], "it was missed"
    assert 'class="people" x="10.0"' in frames[1] and 'class="people doubted" x="60.0"' in frames[1]


@pytest.mark.parametrize(
    ("query", "tasks", "boxes"),
    [
        ("show=right", [1], 1),
        ("show=wrong", [1, 2], 2),
        ("show=missed", [1, 2, 3], 3),
        ("show=all", [1, 2, 3], 5),
        ("label=0", [1, 2], 2),
        ("label=1&show=all", [1, 2, 3], 3),
        ("size=medium&show=all", [1, 3], 2),
        ("score=0.4", [1, 2, 3], 3),
        ("score=0.2", [2, 1, 3], 4),
        ("detected=0&labelled=1", [1], 1),
        ("detected=-1&labelled=1", [3], 1),
        ("detected=1&labelled=-1", [2], 1),
        ("show=nonsense&label=9&size=x&score=7&detected=5&labelled=-7&page=99", [2, 1, 3], 4),
    ],
)
def test_the_filter_shows_what_it_says(measured, query, tasks, boxes):
    answer = measured.app().test_client().get(f"{PAGE}?{query}")
    assert tasks_on(answer) == tasks
    assert f"{boxes} box{'' if boxes == 1 else 'es'}, the images with the most in front" in text_of(answer)


def test_each_number_of_the_matrix_leads_to_its_boxes(measured):
    client = measured.app().test_client()
    cells = re.findall(r'<td class="n \w+"><a href="(\?[^#"]+)#boxes">(\d+)</a>', client.get(PAGE).text)
    assert len(cells) == 5
    for address, number in cells:
        answer = client.get(PAGE + address.replace("&amp;", "&"))
        assert f"{number} box{'' if number == '1' else 'es'}, the images" in text_of(answer), address
        assert "Only what is" in answer.text


def test_paging_keeps_the_filter(place):
    place.train()
    truth = [(i, 0, (10, 10, 9, 9)) for i in range(1, 31)]
    write_round(place, truth, [(i, 1, 0.9, (60, 40, 9, 9)) for i in range(1, 31)], 30)
    client = place.app().test_client()
    answer = client.get(f"{PAGE}?show=missed&page=2")
    assert tasks_on(answer) == list(range(13, 25)) and "Page 2 of 3" in text_of(answer)
    assert 'href="?show=missed&amp;page=3"' in answer.text
    assert tasks_on(client.get(f"{PAGE}?show=missed&page=-5")) == list(range(1, 13))


def test_empty_states_are_said(place):
    client = place.app().test_client()
    assert "Nothing to tell before the first training." in text_of(client.get(PAGE))
    place.train()
    write_round(place, [], [])
    assert "Nothing is labelled on the 3 images of the evaluation set" in text_of(client.get(PAGE))
    write_round(place, TRUTH, [(i, c, 0.8, box) for i, c, box in TRUTH])
    assert "No mistake: every labelled box was found" in text_of(client.get(PAGE))
    assert "No box fits this choice." in text_of(client.get(f"{PAGE}?size=large"))
    (place.folder(1) / "evaluation" / "1.npz").write_bytes(b"damaged")
    assert "is damaged; run another round" in text_of(client.get(PAGE))
    shutil.rmtree(place.folder(1) / "evaluation")
    assert "No round on disk keeps what version ppal-r1" in text_of(client.get(PAGE))


def test_a_version_trained_on_everything_has_no_errors_to_tell_of(make_place):
    from tests.service.dashboard.conftest import ShownPlace

    place = make_place(ShownPlace, train_on_everything=True)
    place.train()
    assert "was trained on the evaluation set too" in text_of(place.app().test_client().get(PAGE))


def test_images_that_are_gone_or_were_not_looked_at_are_told(measured):
    measured.world.cache.joinpath("2.png").unlink()
    text = text_of(measured.app().test_client().get(PAGE))
    assert "no image on disk" in text
    path = measured.folder(1) / "evaluation" / "1.npz"
    keep(path, {1: []}, ("cat", "dog"))
    text = text_of(measured.app().test_client().get(PAGE))
    assert "2 images of the set are left out: what was predicted there is not on disk" in text


def test_a_later_round_s_set_is_taken_for_the_detector_that_stays_in_force(measured):
    """A ranking, or a training that a better version outlives, measures again what is in force."""
    measured.world.labelled += 10
    measured.round()
    write_round(measured, TRUTH[:1], FOUND[:1], 1, number=2)
    newest = measured.store.versions.of_project(1)[-1]
    assert newest.active and newest.round_number == 2
    assert "on the 1 image of the evaluation set" in text_of(measured.app().test_client().get(PAGE))


def test_of_many_classes_those_with_the_most_mistakes_are_shown():
    labels = tuple(f"c{i}" for i in range(30))
    items = [Judged(1, "missed", (0, 0, 9, 9), 81, None, i, None) for i in range(5, 30) for _ in range(i)]
    matrix = matrix_of(Judgement(items), labels, Filter())
    assert matrix.left_out == 10 and list(matrix.columns) == [*labels[10:], "nothing there"]
    name, cells = matrix.rows[-1]
    assert name == "missed" and [c.count for c in cells] == [*range(10, 30), 0]
    assert cells[0].address == f"show=mistakes&detected={NONE}&labelled=10" and cells[-1].address == ""


def test_a_card_says_how_many_more_there_are(place):
    place.train()
    truth = [(1, 0, (5 * n, 10, 4, 4)) for n in range(9)]
    found = [(1, 1, 0.9 - n / 20, (10 * n, 60, 8, 8)) for n in range(7)]
    write_round(place, truth, found, 1)
    text = text_of(place.app().test_client().get(PAGE))
    assert text.count("Wrong: dog (0.") == 6 and "And 10 more." in text


def test_a_card_says_once_what_is_true_of_several_boxes(place):
    place.train()
    write_round(place, [(1, 0, (5 * n, 10, 4, 4)) for n in range(9)], [(1, 1, 0.9, (10, 60, 8, 8))], 1)
    text = text_of(place.app().test_client().get(PAGE))
    assert text.count("Missed: cat, small (9 times).") == 1 and "Missed: cat, small." not in text
    assert "Wrong: dog (0.90), nothing is labelled there." in text and " more." not in text.split("Task 1")[-1]
