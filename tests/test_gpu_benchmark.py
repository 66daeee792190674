"""benchmarks/gpu.py runs from end to end, and its PyTorch side computes what ours does."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
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
    _, first = dry_run(tmp_path, *CASES[:2])
    done, report = dry_run(tmp_path, *CASES)
    started = [line.split() for line in done.stderr.splitlines()]
    floats = [[c, "tiny", "fp32"] for c in CASES[2:]]
    integers = [[c, "tiny", "int8"] for c in CASES[2:] if c != "torch-dijiang"]
    assert started == [*floats, *integers]
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
    assert [folder.name for folder in (tmp_path / "cache").glob("tiny-*") if "python" not in folder.name] == []


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
    bounded = {name: found for name, found in depths.items() if "100000" not in name}
    results = {
        "bandwidth - fp16": {"bytes_per_second": 1e12},
        "text-parity - fp16": {"logits": dict.fromkeys(LOGITS, 0.995), "step_error": 0.0},
        "decode pythia-2.8b fp16": {"bytes_per_token": 7e8, "depths": depths},
        "decode pythia-410m fp16": {"bytes_per_token": 1e8, "depths": depths},
        "decode opt-350m fp16": {"bytes_per_token": 1e8, "depths": bounded},
        "decode pythia-1b fp16": {"error": "SessionError: it does not fit"},
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
    page = markdown(report)
    assert "| pythia-2.8b fp16, time at 100,000 over 0 | 1 +- 0.02 | | 1.050 | missed |" in page
    assert "| opt-350m fp16 | 1,000.0 | 1.0 | 10% | - |" in page
    assert "- decode pythia-1b fp16: SessionError: it does not fit" in page


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


@pytest.mark.parametrize("kind", ["hf-eager", "hf-static"])
def test_vanilla_peer_runs_on_the_cpu(tmp_path, kind):
    pytest.importorskip("transformers")
    from gpu_torch import measure

    found = measure(kind, Place(tmp_path, "tiny", "fp32", "cpu", dry_run=True))
    assert [len(samples) for samples in found["lengths"].values()] == [2]


def test_step_of_the_static_cache_never_asks_the_host(tmp_path):
    """As a CUDA graph demands; a meta tensor has no numbers that could be read."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from gpu_torch import _static
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
            devices.update(t.device.type for t in tensors)
            return result

    devices = set()
    with torch.inference_mode():
        _, step = _static(Place(tmp_path, "tiny", "fp16", "cpu", dry_run=True), 124, "meta")
        step()
        with Watch():
            step()
    assert devices == {"meta"}


CHILDREN = {
    "killed": ("import os; os.kill(os.getpid(), 9)", "ended with status -9: without a word"),
    "crashed": ("import sys; sys.exit('illegal memory access')", "status 1: illegal memory access"),
    "silent": ("pass", "ended with status 0: without a word"),
}


@pytest.mark.parametrize("child", CHILDREN)
def test_case_that_takes_its_process_down_is_an_error(tmp_path, monkeypatch, child):
    script, message = CHILDREN[child]
    monkeypatch.setattr(gpu, "__file__", str(write(tmp_path, script)))
    assert message in gpu._child("decode tiny fp16", 60)["error"]


def test_case_is_its_last_line_and_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "__file__", str(write(tmp_path, "print('noise'); print('{\"a\": 1}')")))
    assert gpu._child("decode tiny fp16", 60)["a"] == 1
    hang = "import subprocess as s, time; s.Popen(['sleep', '600']); time.sleep(600)"
    monkeypatch.setattr(gpu, "__file__", str(write(tmp_path, hang)))
    assert gpu._child("decode tiny fp16", 0.5) is None


def write(folder, script):
    path = folder / "child.py"
    path.write_text(script)
    return path


def options_of(monkeypatch, tmp_path, *flags):
    command = ["gpu.py", "--presets", "pythia-70m", "--only", "decode", "prefill"]
    command += ["--precision", "fp16", "--cache", tmp_path, *flags]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    return gpu._options()


@pytest.mark.parametrize(
    ("flags", "found", "kept"),
    [
        (["--seconds", 100, "--case-seconds", 50], None, 2),  # given up, and the next one tried
        (["--seconds", 30, "--case-seconds", 50], None, 0),  # its own turn comes in the next call
        (["--seconds", 5], {"a": 1}, 0),  # too little to begin
        ([], {"a": 1}, 2),
    ],
    ids=["hangs", "cut off", "late", "works"],
)
def test_limits_of_a_case_and_of_a_call(monkeypatch, tmp_path, flags, found, kept):
    options, report = options_of(monkeypatch, tmp_path, *flags), {"results": {}}
    monkeypatch.setattr(gpu, "_child", lambda key, seconds: found)
    gpu._run(options, report, tmp_path / "r.json")
    assert len(report["results"]) == kept
    if kept and found is None:
        assert "did not end within 50 s" in report["results"]["decode pythia-70m fp16"]["error"]
    assert not kept or json.loads((tmp_path / "r.json").read_text()) == report


@pytest.mark.parametrize(("flags", "again"), [([], []), (["--retry"], ["decode pythia-70m fp16"])])
def test_what_failed_is_measured_again_on_request(monkeypatch, tmp_path, flags, again):
    keys = ("decode pythia-70m fp16", "prefill pythia-70m fp16")
    report = {"results": dict(zip(keys, ({"error": "no"}, {"a": 1}), strict=True))}
    asked = []
    monkeypatch.setattr(gpu, "_child", lambda key, seconds: asked.append(key) or {"b": 2})
    gpu._run(options_of(monkeypatch, tmp_path, *flags), report, tmp_path / "r.json")
    assert asked == again


def test_asked_sizes_come_first_in_fp16(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    rows = list(dict.fromkeys(row[1:] for row in gpu._plan(gpu._options()) if row[1] != "-"))
    assert rows[:2] == [("pythia-410m", "fp16"), ("pythia-2.8b", "fp16")]
    assert len(rows) == 3 * 8


def test_without_a_driver_it_is_one_line(tmp_path):
    command = [sys.executable, FOLDER / "gpu.py", "--out", tmp_path, "--seconds", 0]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("Error: no NVIDIA driver")
