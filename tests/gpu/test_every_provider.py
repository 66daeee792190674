"""What holds on every provider of GPUs: the kernels executed, on WebGPU and, where there is such a GPU, on CUDA."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main
from dijiang.runtime.sessions.device import CUDA
from dijiang.runtime.sessions.webgpu import WEBGPU
from tests.conftest import EXAMPLES, GOLDEN, Golden, poisoned, take_turns
from tests.graph.test_families import NAMED, check_every_graph
from tests.graph.test_golden import GATE, PADDED, SIDES, SPLITS, check_logits, check_padding
from tests.random_models import POSITIONS
from tests.runtime.test_cuda import check_traffic

TINY = EXAMPLES / "tiny-python"
#: Tokens that a greedy text has in common with the CPU's, and of a text that a verification compares.
TOKENS, VERIFIED = 1000, 1024
#: What ONNX Runtime calls them.
NAMES = {"webgpu": WEBGPU.name, "cuda": CUDA.name}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_bundle_meets_published_logits(loaded, graph, name, split):
    check_logits(loaded(name, graph=graph), Golden.load(name), split)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", PADDED)
def test_padded_batch_meets_published_logits(loaded, graph, name, side):
    check_padding(loaded(name, graph=graph), Golden.load(name), side)


@pytest.mark.parametrize("trained", [False, True], ids=["analytic", "tabled"])
@pytest.mark.parametrize("name", NAMED)
def test_named_variant_meets_the_reference(provider, graph, name, trained):
    check_every_graph(NAMED[name], trained, seed=1, runs=[(graph, provider)])


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


@pytest.mark.parametrize("head", [64, 80, 128, 256])
def test_head_size_of_a_published_shape_meets_the_reference(provider, graph, head):
    config = NAMED["neox-parallel"] | {"hidden_size": 2 * head, "num_attention_heads": 2}
    check_every_graph(config, False, seed=1, length=POSITIONS, runs=[(graph, provider)])


def test_precision_meets_its_gates(loaded, provider, precision):
    report = dijiang.verify(
        loaded("tiny-python", precision=precision, calibration_tokens=None).bundle.path,
        TINY,
        text=TINY / "held_out.txt",
        tokens=VERIFIED,
        provider=provider,
        store=False,
    )
    assert report.failures == ()
    assert all(verdict.found is not None for verdict in report.gates)


def test_greedy_step_moves_sixteen_bytes(loaded, traffic):
    check_traffic(loaded("tiny-python"), traffic)


def test_states_take_turns_and_are_saved(loaded, tmp_path):
    model = loaded("neox-base")
    cpu = dijiang.load(model.bundle.path, provider="cpu")
    states = take_turns(model, cpu, 8, GATE)
    states[0][1].save(tmp_path / "state")
    for layer, other in zip(dijiang.State.load(tmp_path / "state").layers, states[1][1].layers, strict=True):
        np.testing.assert_allclose(layer, other, atol=1e-5)


def test_nan_ends_a_greedy_text(loaded, tmp_path):
    model = loaded("tiny-python")
    state = poisoned(model)
    with pytest.raises(dijiang.SessionError, match="the logits at position 5 hold NaN"):
        list(model.generate(None, state=state))
    with pytest.raises(dijiang.InputError, match="layer 5 of the state holds NaN"):
        state.save(tmp_path / "state")


def test_doctor_shows_that_it_runs(provider):
    findings = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["findings"]
    found = {one["name"]: one for one in findings}
    assert found[NAMES[provider]]["found"] == "runs, with the fused LinearAttention node"
    assert found[f"--provider {provider}"]["status"] == "ok"


def test_bench_has_a_roofline_and_says_what_ran(loaded, provider):
    path = loaded("tiny-python", precision="int8").bundle.path
    options = ["-p", "none", "-n", "16", "-r", "2", "--seconds", "0", "--provider", provider, "-o", "json"]
    done = CliRunner().invoke(main, ["bench", str(path), *options])
    assert done.exit_code == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["provider"] == loaded("tiny-python").provider
    assert result["session"]["captured"]
    roofline = result["roofline"]
    assert roofline["bandwidth"] == result["session"]["bandwidth"] > 0
    assert roofline["percent"] > 0


def test_command_line_runs_on_it(loaded, provider):
    path = loaded("tiny-python").bundle.path
    options = ["-p", "def main(", "-n", "8", "-v"]
    texts = [CliRunner().invoke(main, ["run", str(path), *options, "--provider", p]) for p in (provider, "cpu")]
    assert texts[0].stdout == texts[1].stdout
    assert f" graph on {NAMES[provider]}" in texts[0].stderr
