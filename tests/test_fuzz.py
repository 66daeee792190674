"""A sample of the fuzzed checkpoints of `make fuzz`, and what it found before."""

import json
import os
from pathlib import Path

import pytest

from tests.fuzz import Worker, draw_case, run_cases

CORPUS = {file.stem: json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "corpus").glob("*"))}
SAMPLE = 300
#: What is written when nothing is wrong takes longest; the other graphs and verification are left to `make fuzz`.
LIGHT = {"verify": False, "graph": "primitive", "precision": "fp32"}


def test_sample_of_fuzzed_checkpoints_is_one_line_or_whole():
    report = run_cases((number, draw_case(0, number) | LIGHT) for number in range(SAMPLE))
    assert report["findings"] == []
    assert sum(report["outcomes"].values()) == SAMPLE
    assert {"convert: written", "convert: CheckpointError", "export: written"} <= report["outcomes"].keys()


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    one = Worker(tmp_path_factory.mktemp("fuzz"))
    yield one
    one.end()


@pytest.mark.parametrize("name", CORPUS)
def test_what_was_found_before_stays_mended(worker, name):
    outcome, found, _, _ = worker.run(CORPUS[name]["case"])
    assert (outcome in ("written", "CheckpointError", "ExportError"), found) == (True, "")


FAULTS = {
    "a traceback": (lambda *_, **__: 1 / 0, "finding", "ZeroDivisionError"),
    "a crash": (lambda *_, **__: os._exit(3), "crash", "ended with 3"),
    "a partial output": (lambda _, target, **__: target.mkdir(), "finding", "no dijiang.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzzer_sees_what_it_looks_for(fault, tmp_path, monkeypatch):
    broken, outcome, found = FAULTS[fault]
    monkeypatch.setattr("dijiang.export", broken)
    one = Worker(tmp_path)
    result = one.run(CORPUS["strided-zip"]["case"])
    one.end()
    assert result[0] == outcome
    assert found in result[1]
