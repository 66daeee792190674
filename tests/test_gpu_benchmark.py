"""benchmarks/gpu.py runs from end to end, and its PyTorch side computes what ours does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_cases import PEERS, Place
from gpu_report import markdown

import dijiang

FOLDER = Path(__file__).parent.parent / "benchmarks"
CASES = ("bandwidth", "text-parity", "parity", "graphs", "decode", "prefill", "torch-dijiang")


LOGITS = ("max_error", "rms_relative_error", "kl", "top1_agreement")


def dry_run(tmp_path, *cases):
    command = [sys.executable, FOLDER / "gpu.py", "--dry-run", "--cache", tmp_path / "cache"]
    command += ["--out", tmp_path / "out", "--name", "test", "--only", *cases]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done, json.loads((tmp_path / "out" / "gpu-test.json").read_text())


def test_dry_run_measures_every_case_and_goes_on_where_it_ended(tmp_path):
    _, first = dry_run(tmp_path, *CASES[:3])
    done, report = dry_run(tmp_path, *CASES)
    floats = [(c, "tiny", "fp32") for c in CASES[3:]]
    integers = [(c, "tiny", "int8") for c in CASES[3:] if c != "torch-dijiang"]
    assert done.stderr.split() == [word for row in (*floats, *integers) for word in row]
    results = report["results"]
    assert {key.split()[0] for key in results} == set(CASES)
    assert not [key for key, found in results.items() if "error" in found]
    assert all(results[key] == found for key, found in first["results"].items())
    assert results["graphs tiny fp32"]["different"] == 0
    assert all(len(s) == 2 for s in results["decode tiny fp32"]["depths"].values())
    assert results["text-parity - fp32"]["passed"]
    assert results["graphs tiny int8"]["different"] == 0
    table = (tmp_path / "out" / "gpu-test.md").read_text()
    assert "no GPU: a dry run of the script" in table
    assert "| tiny fp32 |" in table


def test_size_that_cannot_run_is_a_line_of_the_report(tmp_path):
    (tmp_path / "cache" / "tiny").mkdir(parents=True)
    (tmp_path / "cache" / "tiny" / "config.json").write_text("{}")
    _, report = dry_run(tmp_path, "decode")
    assert set(report["results"]) == {"decode tiny fp32", "decode tiny int8"}
    assert "CheckpointError" in report["results"]["decode tiny fp32"]["error"]
    assert "CheckpointError" in (tmp_path / "out" / "gpu-test.md").read_text()


def test_report_says_which_numbers_are_reached():
    depths = {
        "graph @ d0": [1e-3],
        "graph @ d2048": [1e-3],
        "graph @ d100000": [1.05e-3],
        "plain @ d0": [1],
    }
    results = {
        "bandwidth - fp16": {"bytes_per_second": 1e12},
        "text-parity - fp16": {"logits": dict.fromkeys(LOGITS, 0.995), "step_error": 0.0},
        "decode pythia-2.8b fp16": {"bytes_per_token": 7e8, "depths": depths},
        "decode pythia-410m fp16": {"bytes_per_token": 1e8, "depths": depths},
        "hf-graph pythia-410m fp16": {"lengths": {"2048": [1.2e-3]}},
        "hf-eager pythia-410m fp16": {"lengths": {"2048": [8e-3]}},
    }
    report = {"gpu": None, "date": "today", "provider": "cuda", "machine": {}, "results": results}
    rows = [line.split(" | ") for line in markdown(report).splitlines() if line.startswith("| fp16")]
    assert [row[3:] for row in rows] == [
        ["0.700", "reached |"],
        ["1.200", "missed |"],
        ["8.000", "stretch |"],
        ["-", "not measured |"],
        ["0.995", "reached |"],
    ]
    assert "| pythia-2.8b fp16, time at 100,000 over 0 | 1 +- 0.02 | | 1.050 | missed |" in markdown(
        report
    )


def test_peers_are_measured_for_gpt_neox_in_floats_only():
    covered = [
        (preset, precision)
        for preset in ("pythia-70m", "llama2-7b")
        for precision in ("fp16", "int8")
        if PEERS[0].covers(preset, precision)
    ]
    assert covered == [("pythia-70m", "fp16")]


def test_eager_pytorch_step_chooses_our_tokens(tmp_path):
    pytest.importorskip("torch")
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
