"""A plug-in of pytest: names each test to coverage, and keeps how long it took."""

import json
import os
from collections import defaultdict

import coverage
import pytest

DURATIONS = defaultdict(float)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    coverage.Coverage.current().switch_context(item.nodeid)
    return (yield)


def pytest_runtest_logreport(report):
    DURATIONS[report.nodeid] += report.duration if report.outcome != "skipped" else 1e9


def pytest_sessionfinish():
    with open(os.environ["MUTANTS_DURATIONS"], "w") as stream:
        json.dump(DURATIONS, stream)
