"""Links to Label Studio lead where people's browsers can go."""

import pytest

INSIDE, OUTSIDE = "http://label-studio.local:8080", "https://labels.example.com/studio"
PAGES = ["", "queue", "quality", "learning", "classes", "settings"]


def page_of(trained, page, **changes):
    return trained.app(**changes).test_client().get(f"/ui/projects/1/{page}").text


@pytest.mark.parametrize("page", PAGES)
def test_every_link_is_to_the_public_address(trained, page):
    text = page_of(trained, page, label_studio_url=INSIDE, label_studio_public_url=OUTSIDE)
    assert f'href="{OUTSIDE}/projects/1/data"' in text
    assert f'href="{INSIDE}' not in text


def test_a_task_opens_at_the_public_address(trained):
    assert f'href="{OUTSIDE}/projects/1/data?task=' in page_of(trained, "queue", label_studio_public_url=OUTSIDE)


def test_without_one_links_are_to_the_address_that_the_backend_uses(trained):
    assert f'href="{INSIDE}/projects/1/data?task=' in page_of(trained, "queue", label_studio_url=INSIDE)
    told = trained.store.projects.get(1).url
    assert told and f'href="{told}/projects/1/data?task=' in page_of(trained, "queue", label_studio_url="")
