"""The app of the service tests, and a hostile rest of the world."""

import pytest

from tests.label_studio.test_image_source import Site
from tests.service.conftest import (  # noqa: F401
    app,
    client,
    connected,
    images,
    jobs,
    make_app,
    predictor,
    settings,
)


@pytest.fixture
def label_studio_site():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def internal_site():
    """A web server in the private network that nobody outside may reach through us."""
    site = Site()
    site.answers["/latest/meta-data/"] = (200, {}, b"secret of the machine")
    yield site
    site.close()


@pytest.fixture
def healthy_worker(store):
    """A worker that has just shown a sign of life."""
    from ppal_backend.store import Heartbeat

    Heartbeat(store.workers).beat()
