"""The native graph: what the golden and family tests, which run it too, do not reach."""

import shutil
from collections import Counter

import numpy as np
import onnx
import pytest

import dijiang
from dijiang.exporter.pipeline import step_graph
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from dijiang.recipe import resolve
from dijiang.runtime import operators as native
from tests.conftest import EXAMPLES, GOLDEN, onnx_file
from tests.random_models import POSITIONS, write

compiled = pytest.mark.skipif(native.find_library() is None, reason="no compiled operator")
TINY = EXAMPLES / "tiny-python"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_operator_is_compiled_where_there_is_a_compiler():
    assert native.find_library() is not None


def kinds(name, graph="native"):
    graph = step_graph(load_checkpoint(GOLDEN[name]), graph, resolve("fp32", graph=graph))
    return Counter(node.op_type for node in graph.graph)


def test_layer_of_a_parallel_residual_is_four_nodes():
    found = kinds("neox-base")
    layers = load_checkpoint(GOLDEN["neox-base"]).spec.num_layers
    assert found["RecurrentStep"] == layers
    assert found["MatMul"] == 2 * layers + 1  # each with its bias in an Add; int8 has it in the node
    assert found["AddNorm"] == layers - 1
    assert found["Concat"] == found["Split"] == found["Reshape"] == 0


@compiled
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_every_compiled_head_size_meets_the_reference(tmp_path, size, activation):
    config = {
        "model_type": "gpt_neox",
        "vocab_size": 61,
        "num_hidden_layers": 1,
        "max_position_embeddings": POSITIONS,
        "hidden_size": 3 * size,
        "intermediate_size": 131,
        "num_attention_heads": 3,
        "use_parallel_residual": True,
        "hidden_act": activation,
    }
    folder = write(tmp_path, config, trained=False, seed=size)
    model = dijiang.load(dijiang.export(folder, tmp_path / "b", graph="native", verify=False).path)
    ids = np.random.default_rng(0).integers(0, 61, (1, 19))
    state = model.new_state()
    pieces = np.split(ids, [17, 18], axis=1)
    parts = [model.forward(piece, state, all_logits=True) for piece in pieces]
    expected = Reference(load_checkpoint(folder)).forward(ids)[0]
    assert np.abs(np.concatenate(parts, axis=1)[0] - expected).max() <= 1e-4


@compiled
@pytest.mark.parametrize(("precision", "kl"), [("int8", 1e-3), ("int4", 5e-2)])
def test_integer_weights_meet_the_gates_on_text(exported, precision, kl):
    bundle = exported("tiny-python", precision=precision, calibration_tokens=None)
    text = TINY / "held_out.txt"
    report = dijiang.verify(bundle, TINY, text=text, tokens=2048, graph="native", store=False)
    assert report.logits.kl <= kl
    assert report.logits.perplexity_change <= 0.01


@compiled
def test_integer_weights_are_those_of_the_ort_graph(exported):
    weights = []
    for graph in ("ort", "native"):
        path = onnx_file(exported("tiny-python", graph=graph, precision="int4"))
        stored = onnx.load(path).graph.initializer
        weights.append({t.name: t.raw_data for t in stored if t.name.endswith(".codes")})
    assert weights[0] == weights[1]


@compiled
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_do_not_change_the_result(exported, precision, batch):
    """Of a prompt in pieces, a step of few tokens and one of a single token: each has kernels of its own."""
    bundle = exported("tiny-python", graph="native", precision=precision)
    ids = np.random.default_rng(0).integers(0, 2048, (batch, 300))
    found = []
    for threads in (1, 2, 3):
        model = dijiang.load(bundle, threads=threads)
        state = model.new_state(batch)
        logits = [model.forward(ids[:, :length], state, all_logits=True) for length in (300, 5, 1)]
        found.append([*logits, *state.layers])
    for other in found[1:]:
        assert all(map(np.array_equal, found[0], other))


@compiled
def test_bundle_for_the_cpu_is_refused_elsewhere(exported):
    with pytest.raises(dijiang.SessionError, match="runs on cpu, not on cuda; use --provider cpu"):
        dijiang.load(exported("neox-base", graph="native"), provider="cuda")


def test_sixteen_bits_are_refused(tmp_path):
    with pytest.raises(dijiang.ExportError, match="has activations in fp32 only, not in fp16"):
        dijiang.export(GOLDEN["neox-base"], tmp_path / "b", graph="native", precision="fp16")


def test_installation_without_the_operator_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FILE", "_absent.so")
    with pytest.raises(dijiang.ExportError, match=r"install a C\+\+ compiler .* --graph ort"):
        dijiang.export(GOLDEN["neox-base"], tmp_path / "b", graph="native")
    bundle = dijiang.export(GOLDEN["neox-base"], tmp_path / "b", graph="native", verify=False)
    with pytest.raises(dijiang.SessionError, match=r"install a C\+\+ compiler .* --graph ort"):
        dijiang.load(bundle.path)
