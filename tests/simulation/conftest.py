"""Tests of simulations write thousands of small files; none needs them flushed to the disk."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_flush():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
