"""Pages with 20,000 tasks and 50 rounds; benchmarks/dashboard.py tells how fast they open."""

import gc

import pytest

from benchmarks.dashboard import Size, build, forget, pages_of
from ppal_backend.files import read_json
from tests.service.dashboard.conftest import ShownPlace

SIZE = Size()
PAGES = pages_of(SIZE)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    place = ShownPlace(tmp_path_factory.mktemp("large") / "data")
    build(place.settings, place.store, SIZE)
    yield place
    place.store.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_a_large_project_opens(large, page):
    client = large.app().test_client()
    forget()  # the first visitor has to read the files
    assert client.get(f"/{page}").status_code == 200


def test_reading_a_large_file_is_not_held_up_by_the_collector(tmp_path):
    path, collected = tmp_path / "large.json", []
    path.write_text("[" + ",".join(['{"image_id": 1}'] * 20_000) + "]")
    gc.callbacks.append(note := lambda phase, _: collected.append(phase))
    try:
        value = read_json(path)
        at_the_end = list(collected)
    finally:
        gc.callbacks.remove(note)
    assert len(value) == 20_000 and gc.isenabled()
    assert len(at_the_end) <= 2, "it began and ended once at most, when it was on again"
    path.write_text("[")
    with pytest.raises(ValueError):
        read_json(path)
    assert gc.isenabled()
