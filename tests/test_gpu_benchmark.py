"""benchmarks/gpu.py runs from end to end, and its PyTorch side computes what ours does."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu
import numpy as np
import pytest
from bundles import Place
from gpu_cases import CASES as ALL_CASES
from gpu_cases import Run
from gpu_page import markdown

import dijiang
from dijiang.bench.matrix import Test
from dijiang.bench.measure import Samples, Turn
from dijiang.bench.report import target
from dijiang.bench.results import flatness_of, result_of
from dijiang.bench.subject import Side, Traffic, load_bundle
from dijiang.machine.sensors import Meter
from tests.conftest import RUNNABLE

FOLDER = Path(__file__).parent.parent / "benchmarks"
CASES = (
    *("bandwidth", "text-parity", "parity", "graphs"),
    *("decode", "decode-plain", "prefill", "prefill-plain", "torch-dijiang"),
)


LOGITS = ("max_error", "rms_relative_error", "kl", "top1_agreement")


def dry_run(tmp_path, *cases, precision=("fp32", "int8")):
    command = [sys.executable, FOLDER / "gpu.py", "--dry-run", "--cache", tmp_path / "cache"]
    command += ["--out", tmp_path / "out", "--name", "test", "--only", *cases]
    command += ["--precision", *precision]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done, json.loads((tmp_path / "out" / "gpu-test-dry-run.json").read_text())


@pytest.mark.samples
def test_dry_run_measures_every_case_and_goes_on_where_it_ended(tmp_path):
    _, first = dry_run(tmp_path, *CASES[:2])
    done, report = dry_run(tmp_path, *CASES, precision=("fp32",))
    started = [line.split() for line in done.stderr.splitlines()]
    assert started == [[c, "tiny", "fp32"] for c in CASES[2:]]
    done, report = dry_run(tmp_path, "graphs", "torch-dijiang")
    started = [line.split() for line in done.stderr.splitlines()]
    assert started == [["graphs", "tiny", "int8"]], "PyTorch has no integers"
    results = report["results"]
    assert {key.split()[0] for key in results} == set(CASES)
    assert not [key for key, found in results.items() if "error" in found]
    assert all(results[key] == found for key, found in first["results"].items())
    assert results["graphs tiny fp32"]["different"] == 0
    decoded = results["decode tiny fp32"]["results"]
    assert [r["test"] for r in decoded] == ["tg4", "tg4 @ d2048"]
    assert all(target(r)["latency"]["count"] == 2 and r["interleaved"] for r in decoded)
    assert decoded[0]["session"] == {
        "graph": RUNNABLE[0],
        "longest_piece": 256,
        "captured": None,
        "bandwidth": None,
    }
    assert len(results["torch-dijiang tiny fp32"]["results"][0]["decode"]["latency"]["values"]) == 2
    assert results["text-parity tiny-python fp32"]["passed"]
    assert results["graphs tiny int8"]["different"] == 0
    table = (tmp_path / "out" / "gpu-test-dry-run.md").read_text()
    assert "no GPU: a dry run of the script" in table
    assert "| tiny fp32 | fp32 | tg4 @ d2048 |" in table
    assert "| tiny fp32 plain | fp32 | pp128 |" in table
    assert [folder.name for folder in (tmp_path / "cache").glob("tiny-*") if "python" not in folder.name] == [
        "tiny-float16"
    ]


def test_size_that_cannot_run_is_a_line_of_the_report(tmp_path):
    (tmp_path / "cache" / "tiny-float16").mkdir(parents=True)
    (tmp_path / "cache" / "tiny-float16" / "config.json").write_text("{}")
    _, report = dry_run(tmp_path, "decode")
    assert set(report["results"]) == {"decode tiny fp32", "decode tiny int8"}
    assert "CheckpointError" in report["results"]["decode tiny fp32"]["error"]
    assert "CheckpointError" in (tmp_path / "out" / "gpu-test-dry-run.md").read_text()


def report(name, weights, seconds):
    """A report of 64-token samples; seconds: of a step, by depth."""
    side = Side(name, "", load_bundle, Traffic(weights), {"precision": "fp16"})
    results = [
        result_of(
            side,
            Test("tg", 64, depth),
            Samples(1.0, "CUDA", turns=[Turn(0, [64 * each])], interleaved=True),
            0.0,
            Meter([]),
        )
        for depth, each in seconds.items()
    ]
    parts = {"models": [side.to_dict()], "results": results, "flatness": flatness_of(results)}
    return parts | {"schema_version": 2, "ratios": [], "errors": []}


def test_report_says_which_numbers_are_reached():
    depths = {0: 1e-3, 2048: 1e-3, 100_000: 1.05e-3}
    fast, bounded = depths | {100_000: 0.9e-3}, {0: 1e-3, 2048: 1e-3}
    results = {
        "bandwidth tiny-python fp16": {"bytes_per_second": 1e12},
        "text-parity tiny-python fp16": {"logits": dict.fromkeys(LOGITS, 0.995), "step_error": 0.0},
        "decode pythia-2.8b fp16": report("pythia-2.8b fp16", 7 * 10**8, depths),
        "decode pythia-410m fp16": report("pythia-410m fp16", 10**8, depths),
        "decode pythia-70m fp16": report("pythia-70m fp16", 10**8, fast),
        "decode opt-350m fp16": report("opt-350m fp16", 10**8, bounded),
        "decode pythia-1b fp16": {"error": "SessionError: it does not fit"},
        "hf-graph pythia-410m fp16": report("hf-graph pythia-410m fp16", 0, {1984: 1.2e-3}),
        "hf-eager pythia-410m fp16": report("hf-eager pythia-410m fp16", 0, {1984: 8e-3}),
    }
    page = markdown({"gpu": None, "date": "today", "provider": "cuda", "machine": {}, "results": results})
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| fp16")]
    assert [(row[3], row[5].split(" |")[0]) for row in rows] == [
        ("70.0%", "reached"),
        ("1.2", "missed"),
        ("8", "stretch"),
        ("not measured", ""),
        ("99.5%", "reached"),
    ]
    times = [line.split(" | ") for line in page.splitlines() if "time at 100,000 over 0" in line]
    assert [(row[0], row[3], row[5]) for row in times] == [
        ("| pythia-2.8b fp16, time at 100,000 over 0", "1.05", "missed"),
        ("| pythia-410m fp16, time at 100,000 over 0", "1.05", "missed"),
        ("| pythia-70m fp16, time at 100,000 over 0", "0.9", "missed"),
    ]
    (opt,) = [line for line in page.splitlines() if line.startswith("| opt-350m fp16 | fp16 | tg64 | 1 |")]
    assert "| 1,000 |" in opt
    assert opt.endswith("| 10 |")
    assert "- FAILED: decode pythia-1b fp16: SessionError: it does not fit" in page


def test_peers_are_measured_for_gpt_neox_in_floats_only():
    peer = next(case for case in ALL_CASES if case.name == "hf-eager")
    covered = [
        (preset, precision)
        for preset in ("pythia-70m", "llama2-7b")
        for precision in ("fp16", "int8")
        if peer.covers(preset, precision)
    ]
    assert covered == [("pythia-70m", "fp16")]


def tiny(folder):
    return Place(folder, "tiny", "fp32", "cpu", (("target", "cuda"),))


def test_eager_pytorch_step_chooses_our_tokens(tmp_path):
    pytest.importorskip("torch")
    from torch_models import Eager

    place = tiny(tmp_path)
    eager, model = Eager(str(place.checkpoint), None, "cpu"), dijiang.load(place.bundle)
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
    case = next(case for case in ALL_CASES if case.name == kind)
    (found,) = case.run(Run(tiny(tmp_path), dry_run=True))["results"]
    assert (found["test"], found["decode"]["latency"]["count"]) == ("tg4 @ d124", 2)
    assert found["provider"].startswith("PyTorch")


def test_cuda_graphs_of_a_peer_need_a_gpu(tmp_path):
    pytest.importorskip("transformers")
    case = next(case for case in ALL_CASES if case.name == "hf-graph")
    with pytest.raises(dijiang.BenchError, match="CUDA graphs need a GPU"):
        case.run(Run(tiny(tmp_path), dry_run=True))


@pytest.mark.parametrize("depth", [0, 5])
def test_dynamic_cache_grows_from_its_depth_in_each_repetition(tmp_path, depth):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from torch_models import Vanilla

    subject = Vanilla("", None, "cpu", tiny(tmp_path).config, "fp32", "dynamic")
    seen, real = [], subject._step
    subject._step = lambda token, cache: seen.append(cache.get_seq_length()) or real(token, cache)
    subject.prepare([Test("tg", 3, depth)])
    for _ in range(2):
        subject.seconds(Test("tg", 3, depth))
    assert seen == 2 * [depth, depth + 1, depth + 2]
    assert torch.is_inference_mode_enabled() is False


def test_step_of_the_static_cache_never_asks_the_host(tmp_path):
    """As a CUDA graph demands; a meta tensor has no numbers that could be read."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch_models import Vanilla

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
            devices.update(t.device.type for t in tensors)
            return result

    devices = set()
    with torch.inference_mode():
        subject = Vanilla("", None, "meta", tiny(tmp_path).config, "fp16", "static")
        _, step = subject.make(Test("tg", 1, 124))
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
    assert message in gpu.child("decode tiny fp16", 60)["error"]


def test_case_is_its_last_line_and_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "__file__", str(write(tmp_path, "print('noise'); print('{\"a\": 1}')")))
    assert gpu.child("decode tiny fp16", 60)["a"] == 1
    late = tmp_path / "late"
    grandchild = f"import time; time.sleep(1.5); open({str(late)!r}, 'w')"
    hang = f"import subprocess as s, sys, time; s.Popen([sys.executable, '-c', {grandchild!r}])"
    hang += "; time.sleep(600)"
    monkeypatch.setattr(gpu, "__file__", str(write(tmp_path, hang)))
    assert gpu.child("decode tiny fp16", 0.5) is None
    time.sleep(2)
    assert not late.exists()


def write(folder, script):
    path = folder / "child.py"
    path.write_text(script)
    return path


def options_of(monkeypatch, tmp_path, *flags):
    command = ["gpu.py", "--presets", "pythia-70m", "--only", "decode", "prefill"]
    command += ["--precision", "fp16", "--cache", tmp_path, *flags]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    return gpu.read_options()


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
    monkeypatch.setattr(gpu, "child", lambda key, seconds: found)
    gpu.measure(options, report, tmp_path / "r.json")
    assert len(report["results"]) == kept
    if kept and found is None:
        assert "did not end within 50 s" in report["results"]["decode pythia-70m fp16"]["error"]
    assert not kept or json.loads((tmp_path / "r.json").read_text()) == report


@pytest.mark.parametrize(("flags", "again"), [([], []), (["--retry"], ["decode pythia-70m fp16"])])
def test_what_failed_is_measured_again_on_request(monkeypatch, tmp_path, flags, again):
    keys = ("decode pythia-70m fp16", "prefill pythia-70m fp16")
    report = {"results": dict(zip(keys, ({"error": "no"}, {"a": 1}), strict=True))}
    asked = []
    monkeypatch.setattr(gpu, "child", lambda key, seconds: asked.append(key) or {"b": 2})
    gpu.measure(options_of(monkeypatch, tmp_path, *flags), report, tmp_path / "r.json")
    assert asked == again


def test_asked_sizes_come_first_in_fp16(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    rows = list(dict.fromkeys(row[1:] for row in gpu.plan_of(gpu.read_options()) if row[1] != "tiny-python"))
    assert rows[:2] == [("pythia-410m", "fp16"), ("pythia-2.8b", "fp16")]
    assert len(rows) == 3 * 8


def test_without_a_driver_it_is_one_line(tmp_path):
    command = [sys.executable, FOLDER / "gpu.py", "--out", tmp_path, "--seconds", 0]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("Error: no NVIDIA driver")
