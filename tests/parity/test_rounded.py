"""The twin that is rounded as plainly as can be, and what is judged by it."""

import ml_dtypes
import numpy as np
import pytest

import dijiang
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from dijiang.parity.rounded import Rounded, in_blocks, in_type
from dijiang.recipe import Blocks, resolve
from tests.conftest import EXAMPLES, GOLDEN, RUNNABLE
from tests.graph.test_families import NAMED
from tests.random_models import write

pytestmark = pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
EXAMPLE = EXAMPLES / "tiny-python"
IDS = np.random.default_rng(0).integers(0, 61, (1, 24))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block"), [(64, 64), (96, 64), (37, 16), (128, 16)])
def test_integers_are_within_half_a_step_of_a_block(width, block, bits):
    x = np.random.default_rng(width).normal(size=(5, width)).astype(np.float32)
    found = in_blocks(x, Blocks(bits, block))
    for start in range(0, width, block):
        here = slice(start, start + block)
        step = np.abs(x[:, here]).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        assert (np.abs(found - x)[:, here] <= 0.5001 * step).all()


def test_channels_are_mixed_before_and_after():
    """One large channel costs its neighbours their bits; mixed, it does not."""
    x = np.random.default_rng(1).normal(size=(50, 64)).astype(np.float32)
    x[:, 3] *= 100
    small = np.arange(64) != 3
    apart, mixed = (in_blocks(x, Blocks(8, 64, rotation)) for rotation in (0, 64))
    assert relative(mixed[:, small], x[:, small]) < 0.4 * relative(apart[:, small], x[:, small])
    assert not in_blocks(np.zeros((2, 64), np.float32), Blocks(4, 64, 64)).any()


@pytest.mark.parametrize(("name", "type_"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_types_are_rounded_as_numpy_rounds_them(name, type_):
    x = np.random.default_rng(2).normal(size=100).astype(np.float32)
    assert np.array_equal(in_type(x, name), x.astype(type_).astype(np.float32))
    assert in_type(x, "fp32") is x


def test_with_nothing_to_round_it_is_the_reference_in_float32():
    model = load_checkpoint(GOLDEN["neox-base"])
    plain = Reference(model, np.float32).forward(IDS)
    assert np.array_equal(Rounded(model, resolve("fp32")).forward(IDS), plain)
    assert not np.array_equal(Rounded(model, resolve("bf16")).forward(IDS), plain)


@pytest.mark.parametrize("name", NAMED)
def test_weights_that_a_bundle_rounds_are_rounded_and_no_others(name, tmp_path):
    model = load_checkpoint(write(tmp_path, NAMED[name]))
    twin = Rounded(model, resolve("int8"))._weights
    for weight in twin:
        module, _, part = weight.rpartition(".")
        kept = part == "bias" or "norm" in module or module.endswith(("proj", "positions")) or part in ("D1", "D2")
        assert np.array_equal(twin[weight], np.asarray(model.weights[weight])) == kept, weight
    head = np.asarray(model.weights["head.weight"])
    assert relative(twin["head.weight"], head) < 0.01


def test_form_of_tensorrt_is_not_mixed_and_keeps_the_embedding(tmp_path):
    model = load_checkpoint(write(tmp_path, NAMED["neox-parallel"]))
    twin = Rounded(model, resolve("int4", target="tensorrt"))._weights
    assert np.array_equal(twin["embed.weight"], in_type(np.asarray(model.weights["embed.weight"]), "fp16"))
    weight = np.asarray(model.weights["layers.0.gate.weight"])  # 24 inputs: no block of 16 is whole
    assert np.array_equal(twin["layers.0.gate.weight"], in_type(weight, "fp16"))


def test_twin_of_tensorrt_has_the_blocks_of_its_form(tmp_path):
    """4 bits have 32 inputs a scale there: with 64 the twin would be further off, and the gates too wide."""
    config = NAMED["neox-parallel"] | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = load_checkpoint(write(tmp_path, config))
    weight = np.asarray(model.weights["layers.0.mlp_down.weight"])
    for precision, block in (("int4", 32), ("int8", 64)):
        recipe = resolve(precision, target="tensorrt")
        found = Rounded(model, recipe)._weights["layers.0.mlp_down.weight"]
        blocks = Blocks(recipe.body.bits, block)
        np.testing.assert_array_equal(found, in_blocks(weight.T, blocks).T)


@pytest.mark.parametrize("head", [None, "int4"])
def test_tied_table_that_a_graph_for_cuda_keeps_is_kept_in_the_twin(tmp_path, head):
    model = load_checkpoint(write(tmp_path, NAMED["llama-biased-tied"]))
    table = np.asarray(model.weights["embed.weight"])
    twin = Rounded(model, resolve("int8", target="cuda", head_precision=head))._weights
    assert np.array_equal(twin["embed.weight"], in_type(table, "fp16"))


def test_what_a_budget_keeps_in_8_bits_is_so_in_the_twin(tmp_path):
    """A graph keeps several weights in one, and names it after them."""
    bundle = dijiang.export(
        EXAMPLE, tmp_path / "b", precision="int4", budget=2.9, calibration_tokens=64, verify=False
    )
    kept = bundle.manifest.recipe.budget.kept
    model = load_checkpoint(EXAMPLE)
    twin = Rounded(model, bundle.manifest.recipe)._weights
    fine = {
        name
        for name in twin
        if name.endswith(("qkv.weight", "gate.weight", "out.weight", "mlp_up.weight", "mlp_down.weight"))
        and relative(twin[name], np.asarray(model.weights[name])) < 0.02
    }
    assert fine == {part for whole in kept for part in whole.replace(".normed", "").split("+")} != set()


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16", "bf16"])
@pytest.mark.parametrize("name", NAMED)
def test_right_bundle_of_every_variant_is_within_what_rounding_costs(name, precision, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    folder = write(tmp_path / "checkpoint", NAMED[name], seed=2)
    bundle = dijiang.export(folder, tmp_path / "b", precision=precision, verify=False)
    report = dijiang.verify(bundle.path, folder)
    assert report.passed, report.failures
    assert {gate.metric for gate in report.gates} >= {"state_over_rounding", "error_over_rounding"}
    # The unit is the twin's own difference from float64, in the parallel form, too.
    model = load_checkpoint(folder)
    ids = np.array(report.detail.ids)[None, : report.positions]
    found = relative(Rounded(model, bundle.manifest.recipe).forward(ids), Reference(model).forward(ids))
    assert found == pytest.approx(report.rounded.rms_relative_error, rel=0.1)


def test_rounded_state_is_of_the_first_two_layers(tmp_path):
    """Deeper ones have gathered the rounding of those before: an error beside theirs would look small."""
    folder = write(tmp_path, NAMED["llama-gqa-4"] | {"num_hidden_layers": 4}, trained=False, seed=0)
    bundle = dijiang.export(folder, tmp_path / "b", precision="int4", calibration_tokens=0, verify=False)
    report = dijiang.verify(bundle.path, folder, store=False)
    model, ids = load_checkpoint(folder), np.array(report.detail.ids)[None]
    twin, exact = Rounded(model, bundle.manifest.recipe), Reference(model)
    states = [one.new_state(1) for one in (twin, exact)]
    for one, state in zip((twin, exact), states, strict=True):
        one.forward(ids, 0, state)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*states, strict=True)]
    assert max(errors[2:]) > 1.2 * max(errors[:2])
    assert report.rounded_state == pytest.approx(max(errors[:2]), rel=1e-3)
