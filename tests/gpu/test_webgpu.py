"""The WebGPU provider, its kernels executed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main
from dijiang.recipe import GRAPHS, PROVIDERS
from dijiang.runtime.sessions.webgpu import SOFTWARE, WEBGPU, adapter, is_software
from tests.conftest import EXAMPLES, GOLDEN, Golden, take_turns
from tests.graph.test_families import NAMED, check_every_graph
from tests.graph.test_golden import GATE, PADDED, SIDES, SPLITS, check_logits, check_padding
from tests.random_models import POSITIONS, write
from tests.runtime.test_cuda import check_traffic

TINY = EXAMPLES / "tiny-python"
#: Tokens that a greedy text has in common with the CPU's, and of a text that a verification compares.
TOKENS, VERIFIED = 1000, 1024


@pytest.fixture(scope="module")
def loaded(exported):
    """loaded(checkpoint, **options): the bundle on WebGPU, loaded once."""
    models = {}

    def get(name, **options):
        key = (name, *sorted(options.items()))
        if key not in models:
            models[key] = dijiang.load(exported(name, **options), provider="webgpu")
        return models[key]

    return get


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_bundle_meets_published_logits(loaded, name, split):
    check_logits(loaded(name), Golden.load(name), split)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", PADDED)
def test_padded_batch_meets_published_logits(loaded, name, side):
    check_padding(loaded(name), Golden.load(name), side)


@pytest.mark.parametrize("trained", [False, True], ids=["analytic", "tabled"])
@pytest.mark.parametrize("name", NAMED)
def test_named_variant_meets_the_reference(name, trained):
    check_every_graph(NAMED[name], trained, seed=1, runs=[("webgpu", "webgpu")])


def test_greedy_text_is_the_cpus_from_a_captured_step(loaded):
    model = loaded("tiny-python")
    assert model.session.cuda_graph
    cpu = dijiang.load(model.bundle.path, provider="cpu")
    found, expected = (
        [record.token for record in one.generate("def main(", max_tokens=TOKENS, ignore_eos=True)]
        for one in (model, cpu)
    )
    assert found == expected
    assert len(found) == TOKENS


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMED)
def test_named_variant_in_blocks_is_the_cpus(tmp_path, name, precision):
    """Both compute with float activations: they differ by the rounding of float32."""
    (tmp_path / "checkpoint").mkdir()
    folder = write(tmp_path / "checkpoint", NAMED[name])
    bundle = dijiang.export(folder, tmp_path / "b", precision=precision, calibration_tokens=0, verify=False)
    ids = np.random.default_rng(0).integers(0, NAMED[name]["vocab_size"], (2, 9))
    found, expected = (
        (model := dijiang.load(bundle.path, provider=provider, graph="webgpu")).forward(
            ids, model.new_state(2), all_logits=True
        )
        for provider in ("webgpu", "cpu")
    )
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("head", [64, 80, 128, 256])
def test_head_size_of_a_published_shape_meets_the_reference(head):
    config = NAMED["neox-parallel"] | {"hidden_size": 2 * head, "num_attention_heads": 2}
    check_every_graph(config, False, seed=1, length=POSITIONS, runs=[("webgpu", "webgpu")])


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_precision_meets_its_gates(loaded, precision):
    report = dijiang.verify(
        loaded("tiny-python", precision=precision, calibration_tokens=None).bundle.path,
        TINY,
        text=TINY / "held_out.txt",
        tokens=VERIFIED,
        provider="webgpu",
        store=False,
    )
    assert report.failures == ()
    assert all(verdict.found is not None for verdict in report.gates)


def test_fp16_fails_its_gate_as_the_table_says(exported, monkeypatch):
    """When a newer plug-in sums in float32, this fails, and the row can go."""
    row, form = PROVIDERS["webgpu"], GRAPHS["webgpu"]
    monkeypatch.setitem(PROVIDERS, "webgpu", replace(row, refused={}))
    monkeypatch.setitem(GRAPHS, "webgpu", replace(form, types=("fp32", "fp16")))
    bundle = exported("tiny-python", precision="fp16", graph="webgpu")
    report = dijiang.verify(
        bundle, TINY, text=TINY / "held_out.txt", tokens=VERIFIED, provider="webgpu", store=False
    )
    (failed,) = (verdict for verdict in report.gates if not verdict.passed)
    assert (failed.metric, failed.bound) == ("kl", 1e-5)
    assert f"KL {failed.found:.1e}" in row.refused["fp16"]


def test_greedy_step_moves_sixteen_bytes(loaded, traffic):
    check_traffic(loaded("tiny-python"), traffic)


def test_states_take_turns_and_are_saved(loaded, tmp_path):
    model = loaded("neox-base")
    cpu = dijiang.load(model.bundle.path, provider="cpu")
    states = take_turns(model, cpu, 8, GATE)
    states[0][1].save(tmp_path / "state")
    for layer, other in zip(dijiang.State.load(tmp_path / "state").layers, states[1][1].layers, strict=True):
        np.testing.assert_allclose(layer, other, atol=1e-5)


def test_doctor_shows_that_it_runs():
    findings = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["findings"]
    found = {one["name"]: one for one in findings}
    assert found[WEBGPU.name]["found"] == "runs, with the fused LinearAttention node"
    assert found["--provider webgpu"]["status"] == "ok"


def test_bench_has_a_roofline_and_says_what_ran(loaded):
    path = loaded("tiny-python", precision="int8").bundle.path
    options = ["-p", "none", "-n", "16", "-r", "2", "--seconds", "0", "--provider", "webgpu", "-o", "json"]
    done = CliRunner().invoke(main, ["bench", str(path), *options])
    assert done.exit_code == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["provider"] == loaded("tiny-python").provider
    assert result["session"]["captured"]
    roofline = result["roofline"]
    assert roofline["bandwidth"] == result["session"]["bandwidth"] > 0
    assert roofline["percent"] > 0


def test_command_line_runs_on_it(loaded):
    path = loaded("tiny-python").bundle.path
    options = ["-p", "def main(", "-n", "8", "-v"]
    texts = [CliRunner().invoke(main, ["run", str(path), *options, "--provider", p]) for p in ("webgpu", "cpu")]
    assert texts[0].stdout == texts[1].stdout
    assert f"[webgpu graph on {WEBGPU.name}" in texts[0].stderr


def test_auto_stays_on_the_cpu_where_only_software_is(loaded):
    if not is_software(adapter()):
        pytest.skip("this machine has a GPU")
    assert dijiang.load(loaded("tiny-python").bundle.path).provider == "CPUExecutionProvider"


def test_no_vulkan_driver_is_one_line(loaded):
    path = loaded("neox-base").bundle.path
    environment = os.environ | {"VK_ICD_FILENAMES": "/nothing.json", "VK_DRIVER_FILES": "/nothing.json"}
    command = [sys.executable, "-m", "dijiang", "run", str(path), "-p", "x", "--provider", "webgpu"]
    done = subprocess.run(command, env=environment | {SOFTWARE: "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert [line for line in done.stderr.splitlines() if line.startswith("Error: ")] == [
        f"Error: {path / 'model.webgpu.onnx'}: {WEBGPU.name} cannot load it (Failed to get a WebGPU adapter: "
        "No supported adapters); install the GPU's Vulkan driver (vulkaninfo shows it)"
    ]
    assert "Traceback" not in done.stderr
