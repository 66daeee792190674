"""Each graph pass: the same function with the nodes it promises."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from dijiang.graph.passes import optimise
from dijiang.graph.passes.fold import FoldNorms
from dijiang.graph.passes.gpu import CentreNorms
from dijiang.graph.passes.merge import DropRejoined, FlattenSplits, MergeOutputs, MergeProjections
from dijiang.graph.passes.residual import FuseResidualNorms
from dijiang.graph.passes.rewrite import Rewrite
from dijiang.graph.passes.types import SetPrecision
from dijiang.graph.schemes import scheme_of
from dijiang.graph.writer import write_graph
from dijiang.models.load import load_checkpoint
from dijiang.recipe import GRAPHS, resolve
from tests.conftest import GOLDEN, RUNNABLE, onnx_file
from tests.graph.test_families import NAMED
from tests.random_models import write

STEPS = [
    FoldNorms,
    CommonSubexpressionEliminationPass,
    MergeProjections,
    FlattenSplits,
    MergeOutputs,
    DropRejoined,
    FuseResidualNorms,
]
NEOX = ["neox-base", "neox-sequential-straddle", "neox-trained-decay"]
#: Ends of the nodes that are RMSNorms.
RMS = ("RMSNormalization", "SkipSimplifiedLayerNormalization")
SMALL = {
    "model_type": "llama",
    "vocab_size": 61,
    "num_hidden_layers": 3,
    "max_position_embeddings": 16,
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_attention_heads": 8,
}
#: Every norm weight of these is random.
LLAMA = {
    "llama-gqa-4": SMALL | {"num_key_value_heads": 2},
    "llama-biased-tied": SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}
#: RMSNormalization is a node of opset 23, which onnxruntime knows since it runs the `ort` graph.
CASES = [*NEOX, *(LLAMA if "ort" in RUNNABLE else ())]


@pytest.fixture
def unfused(tmp_path):
    """unfused(case): the graph that every pass starts from."""

    def build(name):
        if name in GOLDEN:
            return write_graph(load_checkpoint(GOLDEN[name]), "primitive")
        return write_graph(load_checkpoint(write(tmp_path, LLAMA[name])), "ort")

    return build


def outputs(graph):
    """All outputs after seven tokens of two sequences, from a random state."""
    random = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    ids = random.integers(0, 50, (2, 7))
    feeds = {
        "input_ids": ids,
        "position_ids": np.broadcast_to(np.arange(7), ids.shape),
        "attention_mask": np.ones_like(ids),
        "logit_indices": np.broadcast_to(np.arange(7), ids.shape),
    }
    for value in session.get_inputs()[4:]:
        feeds[value.name] = random.normal(size=(2, *value.shape[1:])).astype(np.float32)
    return session.run(None, feeds)


def kinds(graph):
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize("name", CASES)
def test_each_pass_in_turn_keeps_the_function(name, unfused):
    graph = unfused(name)
    expected = outputs(graph)
    for step in STEPS:
        graph = step()(graph).model
        for found, wanted in zip(outputs(graph), expected, strict=True):
            assert np.abs(found - wanted).max() <= 2e-5 * max(1, np.abs(wanted).max()), step.__name__


@pytest.mark.parametrize("name", [name for name in CASES if name in ("neox-base", "llama-gqa-4")])
@pytest.mark.parametrize("step", STEPS)
def test_each_pass_finds_nothing_left_to_do_after_itself(step, name, unfused):
    graph = unfused(name)
    for earlier in STEPS[: STEPS.index(step) + 1]:
        graph = earlier()(graph).model
    assert not step()(graph).modified


@pytest.mark.parametrize("step", [step for step in STEPS if issubclass(step, Rewrite)])
def test_rounds_do_not_grow_with_the_layers(step, tmp_path, monkeypatch):
    rounds = []
    for layers in (2, 12):
        (folder := tmp_path / str(layers)).mkdir()
        write(folder, NAMED["neox-parallel"] | {"num_hidden_layers": layers})
        graph = write_graph(load_checkpoint(folder), "ort")
        for earlier in STEPS[: STEPS.index(step)]:
            graph = earlier()(graph).model
        find, calls = step.matches, []
        with monkeypatch.context() as patch:
            patch.setattr(step, "matches", lambda *a, find=find, calls=calls: calls.append(0) or find(*a))
            step()(graph)
        rounds.append(len(calls))
    assert rounds[0] == rounds[1] <= 5


def test_parallel_residual_has_two_matmuls_a_layer_beside_the_feature_map():
    model = load_checkpoint(GOLDEN["neox-base"])
    graph = optimise(write_graph(model, "ort"), skip_norms=True)
    layers, found = model.spec.num_layers, kinds(graph)
    assert found["MatMul"] == 3 * layers + 1
    assert found["SkipLayerNormalization"] == layers - 1
    assert found["LayerNormalization"] == layers + 2  # a group norm each, the first norm, the last
    assert found["Transpose"] == 0


def test_sequential_residual_merges_the_projections_of_one_input():
    model = load_checkpoint(GOLDEN["neox-sequential-straddle"])
    found = kinds(optimise(write_graph(model, "ort"), skip_norms=True))
    # qkv and gate, P, attention-out, MLP-up, MLP-down; and the head.
    assert found["MatMul"] == 5 * model.spec.num_layers + 1


@pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
@pytest.mark.parametrize("name", LLAMA)
def test_rms_norms_have_no_weights_and_every_sum_but_the_last_is_part_of_one(name, unfused):
    graph = optimise(unfused(name), skip_norms=True)
    layers, found = SMALL["num_hidden_layers"], kinds(graph)
    # qkv and gate, P, attention-out, MLP-gate and -up, MLP-down; and the head.
    assert found["MatMul"] == 5 * layers + 1
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers - 1
    assert found["RMSNormalization"] == 2  # the first, and the last, over the kept tokens only
    weights = {n.inputs[-1].name for n in graph.graph if n.op_type.endswith(RMS)}
    assert weights == {"ones.48", "final_norm.weight"}


def test_layers_of_one_gamma_share_the_log_decay():
    graph = write_graph(load_checkpoint(GOLDEN["neox-base"]), "ort")
    decays = {node.inputs[4] for node in graph.graph if node.op_type == "LinearAttention"}
    assert len(decays) == 1


@pytest.mark.parametrize(
    "step",
    [
        lambda: scheme_of(resolve("int8", graph="ort")).passes(GRAPHS["ort"])[0],
        lambda: scheme_of(resolve("int8", graph="primitive")).passes(GRAPHS["primitive"])[0],
        lambda: SetPrecision("bf16", fused_norms=True),
    ],
    ids=["Quantize", "DequantizeWeights", "SetPrecision"],
)
def test_rounding_takes_no_weights_that_were_rounded_before(unfused, step):
    graph = SetPrecision("fp16", fused_norms=True)(unfused("neox-base")).model
    with pytest.raises(PreconditionError, match="weights"):
        step()(graph)


@pytest.mark.skipif("webgpu" not in RUNNABLE, reason="onnxruntime is older than 1.30")
@pytest.mark.parametrize("name", NEOX)
def test_centred_norms_keep_the_function_and_none_subtracts_the_mean_inside(name):
    model = load_checkpoint(GOLDEN[name])
    plain, centred = (
        optimise(write_graph(model, "webgpu"), skip_norms=True, centred=centred) for centred in (False, True)
    )
    for found, wanted in zip(outputs(centred), outputs(plain), strict=True):
        assert np.abs(found - wanted).max() <= 2e-5 * max(1, np.abs(wanted).max())
    found, before = kinds(centred), kinds(plain)
    norms = before["LayerNormalization"] + before["SkipLayerNormalization"]
    assert found["RMSNormalization"] == found["ReduceMean"] == norms
    assert found["LayerNormalization"] == found["SkipLayerNormalization"] == 0
    assert not CentreNorms()(centred).modified


@pytest.mark.skipif("webgpu" not in RUNNABLE, reason="onnxruntime is older than 1.30")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_graph_for_webgpu_does_not_round_activations(exported, precision):
    bundle = exported("tiny-python", precision=precision)
    levels = {}
    for graph in ("ort", "webgpu"):
        nodes = ir.load(onnx_file(bundle, graph)).graph
        levels[graph] = {n.attributes["accuracy_level"].as_int() for n in nodes if n.op_type == "MatMulNBits"}
    assert levels == {"ort": {4}, "webgpu": {0}}
