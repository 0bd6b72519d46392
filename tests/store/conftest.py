"""Every test of a store runs over every kind of state database."""

import itertools

import pytest

from ppal_backend.store import Database, Store
from tests.servers import new_database, postgresql

CONFIG = "<View/>"
BACKENDS = ["sqlite", "memory", pytest.param("postgresql", marks=pytest.mark.servers)]
_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres():
    with postgresql() as dsn:
        yield dsn


@pytest.fixture(params=BACKENDS)
def database_url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ppal.db"
    if request.param == "memory":
        return "sqlite://"
    return new_database(request.getfixturevalue("postgres"), f"test{next(_numbers)}")


@pytest.fixture
def store(database_url):
    store = Store(Database(database_url))
    yield store
    store.close()


@pytest.fixture
def project(store):
    store.projects.connect(1, "1.111", CONFIG, "http://ls", {})
    return 1
