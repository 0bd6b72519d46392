"""What tests of a round's process begin with: settings, and a store with one project."""

import pytest

from ppal_backend.settings import load_settings


@pytest.fixture
def settings(tmp_path):
    return load_settings(MODEL_DIR=tmp_path, START_TRAINING_EACH_N_UPDATES=5)


@pytest.fixture
def store(store):
    store.projects.connect(1, "1.1", "<View/>", "http://ls", {"delta": 2.0})
    return store
