"""benchmarks/gpu.py runs from end to end, and its PyTorch side computes what ours does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dijiang

FOLDER = Path(__file__).parent.parent / "benchmarks"
CASES = ("bandwidth", "text-parity", "parity", "graphs", "decode", "prefill", "torch-dijiang")


def dry_run(tmp_path, *cases):
    command = [sys.executable, FOLDER / "gpu.py", "--dry-run", "--cache", tmp_path / "cache"]
    command += ["--out", tmp_path / "out", "--name", "test", "--only", *cases]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done, json.loads((tmp_path / "out" / "gpu-test.json").read_text())


def test_dry_run_measures_every_case_and_goes_on_where_it_ended(tmp_path):
    _, first = dry_run(tmp_path, *CASES[:3])
    done, report = dry_run(tmp_path, *CASES)
    assert done.stderr.split() == [w for c in CASES[3:] for w in (c, "tiny", "fp32")]
    results = report["results"]
    assert {key.split()[0] for key in results} == set(CASES)
    assert not [key for key, found in results.items() if "error" in found]
    assert all(results[key] == found for key, found in first["results"].items())
    assert results["graphs tiny fp32"]["different"] == 0
    assert all(len(s) == 2 for s in results["decode tiny fp32"]["depths"].values())
    assert results["text-parity - fp32"]["passed"]
    table = (tmp_path / "out" / "gpu-test.md").read_text()
    assert "no GPU: a dry run of the script" in table
    assert "| tiny fp32 |" in table


def test_size_that_cannot_run_is_a_line_of_the_report(tmp_path):
    (tmp_path / "cache" / "tiny").mkdir(parents=True)
    (tmp_path / "cache" / "tiny" / "config.json").write_text("{}")
    _, report = dry_run(tmp_path, "decode")
    assert "CheckpointError" in report["results"]["decode tiny fp32"]["error"]
    assert "CheckpointError" in (tmp_path / "out" / "gpu-test.md").read_text()


def test_eager_pytorch_step_chooses_our_tokens(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(FOLDER))
    from gpu_cases import Place
    from gpu_torch import Eager

    place = Place(tmp_path, "tiny", "fp32", "cpu", dry_run=True)
    eager, model = Eager(place, "cpu"), dijiang.load(place.bundle)
    state, token = model.new_state(), 0
    for _ in range(12):
        token = int(model.forward(np.array([[token]]), state)[0].argmax())
        eager.step()
        assert eager.token.item() == token
    for layer, array in enumerate(state.layers):
        np.testing.assert_allclose(eager.state[layer].numpy(), array[0], atol=1e-5)
