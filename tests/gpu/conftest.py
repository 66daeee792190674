"""Tests that run kernels: on a GPU, or on lavapipe as `make gpu` sets it up."""

from pathlib import Path

import pytest

from dijiang.runtime.sessions.webgpu import PACKAGE, installed

HERE = Path(__file__).parent
MISSING = pytest.mark.skipif(not installed(PACKAGE), reason=f"{PACKAGE} is not installed: it needs Python 3.11")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(MISSING)
