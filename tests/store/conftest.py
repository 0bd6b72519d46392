import pytest

from ppal_backend.store import Database, Store

CONFIG = "<View/>"


@pytest.fixture
def store(tmp_path):
    store = Store(Database(f"sqlite:///{tmp_path}/ppal.db"))
    yield store
    store.close()


@pytest.fixture
def project(store):
    store.projects.connect(1, "1.111", CONFIG, "http://ls", {})
    return 1
