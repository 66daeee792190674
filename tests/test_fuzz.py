"""A sample of the fuzzed checkpoints of `make fuzz`, and what it found before."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.fuzz.grammar import draw_case
from tests.fuzz.workers import CLASSES, Worker, run_cases

CORPUS = {file.stem: json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "corpus").glob("*"))}
SAMPLE = 300
#: What is written when nothing is wrong takes longest; the other graphs and verification are left to `make fuzz`.
LIGHT = {"verify": False, "graph": "primitive", "precision": "fp32"}


def sample():
    """The report of the first cases of `make fuzz`."""
    return run_cases((number, draw_case(0, number) | LIGHT) for number in range(SAMPLE))


def strangers():
    """The reports of the first cases of every other class."""
    return {
        name: run_cases((number, one.draw_case(0, number)) for number in range(SAMPLE))
        for name, one in CLASSES.items()
    }


def corpus():
    """Name -> what is found today."""
    worker = Worker(Path(tempfile.mkdtemp()))
    found = {name: worker.run(case["case"])[:2] for name, case in CORPUS.items()}
    worker.end()
    return found


def in_a_process(name):
    """What a function of this file returns. Workers are forked, and this process has threads by now."""
    code = f"import json; from tests import test_fuzz; print(json.dumps(test_fuzz.{name}()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.samples
def test_sample_of_fuzzed_checkpoints_is_one_line_or_whole():
    report = in_a_process("sample")
    assert report["findings"] == []
    assert sum(report["outcomes"].values()) == SAMPLE
    assert {"convert: written", "convert: CheckpointError", "export: written"} <= report["outcomes"].keys()


@pytest.mark.samples
def test_sample_of_every_other_class_is_one_line_or_runs():
    for name, report in in_a_process("strangers").items():
        assert report["findings"] == [], name
        assert sum(report["outcomes"].values()) == SAMPLE
        assert len(report["outcomes"]) >= 8, name  # cases reach that many ways to end


def test_what_was_found_before_stays_mended():
    found = in_a_process("corpus")
    assert found.keys() == CORPUS.keys()
    assert {name: result for name, result in found.items() if result[1]} == {}


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
