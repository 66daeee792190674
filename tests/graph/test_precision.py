"""fp16 and bf16: which parts take the type, and how far the result is from float64."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.graph.passes.emulate import Emulate
from dijiang.graph.passes.halves import HalveBytes
from dijiang.graph.passes.types import TYPES
from dijiang.graph.schemes.dequantize import CODES, block_of, rounded
from dijiang.parity.emulation import load_emulated
from dijiang.recipe import GRAPHS
from tests.conftest import EXAMPLES, GOLDEN, RUNNABLE, onnx_file
from tests.graph.test_families import NAMED
from tests.random_models import write

#: By how much of half a step a code may be off once its scale was refitted to all codes of its block.
REFITTED = {8: 1e-3, 4: 0.4}
TINY = EXAMPLES / "tiny-python"
ONNX_TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
#: `onnx` shares its blocks with primitive and its attention with ort.
WRITTEN = [graph for graph in RUNNABLE if "fp16" in GRAPHS[graph].types and graph != "onnx"]


def options(name):
    return {"repair_decay": True} if name == "neox-fp16-bin" else {}


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("graph", WRITTEN)
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_sixteen_bits_meet_their_gates(exported, name, graph, precision):
    bundle = exported(name, graph=graph, precision=precision, **options(name))
    report = dijiang.verify(bundle, GOLDEN[name], tokens=100, store=False)
    assert report.failures == ()
    assert report.logits.max_error > 1e-5  # it was rounded


@pytest.mark.parametrize("graph", WRITTEN)
@pytest.mark.parametrize("variant", NAMED)
def test_every_family_meets_the_gates(tmp_path, variant, graph):
    (tmp_path / "checkpoint").mkdir()
    checkpoint = write(tmp_path / "checkpoint", NAMED[variant], trained=True, seed=1)
    bundle = dijiang.export(checkpoint, tmp_path / "b", graph=graph, precision="fp16", verify=False)
    report = dijiang.verify(bundle.path, checkpoint, tokens=16, store=False)
    assert report.failures == ()
    graph = onnx.load(onnx_file(bundle.path)).graph
    dtype = {w.name: w.data_type for w in graph.initializer}
    left = [n.input[1] for n in graph.node if n.op_type == "MatMul" and dtype.get(n.input[1]) == 1]
    assert all("proj" in name for name in left)


def test_fp16_agrees_with_float64_on_text(exported):
    """The project's own bound: the same most likely token at 99 % of the positions."""
    bundle = exported("tiny-python", precision="fp16")
    report = dijiang.verify(bundle, TINY, text=TINY / "held_out.txt", tokens=2048, store=False)
    assert report.logits.top1_agreement >= 0.99
    assert report.logits.perplexity == pytest.approx(report.logits.reference_perplexity, rel=1e-3)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("graph", WRITTEN)
def test_weights_take_the_type_and_states_do_not(exported, graph, precision):
    bundle = exported("tiny-python", graph=graph, precision=precision)
    written = onnx.load(onnx_file(bundle)).graph
    dtype = {w.name: w.data_type for w in written.initializer}
    users = {w: node for node in written.node for w in node.input}
    for node in written.node:
        if node.op_type == "MatMul" and node.input[1] in dtype:
            is_feature_map = users[node.output[0]].op_type == "Softmax"
            expected = onnx.TensorProto.FLOAT if is_feature_map else ONNX_TYPES[precision]
            assert dtype[node.input[1]] == expected, node.input[1]
    (argmax,) = (node for node in written.node if node.op_type == "ArgMax")
    assert argmax.input[0] == "logits"  # float32: CUDA has no bfloat16 ArgMax
    states = [v for v in (*written.input, *written.output) if "state" in v.name]
    assert len(states) == 12
    kinds = {v.type.tensor_type.elem_type for v in (*states, written.output[0])}
    assert kinds == {onnx.TensorProto.FLOAT}
    whole = exported("tiny-python", graph=graph)
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (bundle, whole)]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_types_are_consistent(exported, name, precision):
    path = onnx_file(exported(name, graph="primitive", precision=precision, **options(name)))
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("precision", TYPES)
def test_emulation_rounds_after_every_node(precision):
    """A hand-made graph against NumPy in the type itself."""
    dtype, numpy = TYPES[precision], TYPES[precision].numpy()
    random = np.random.default_rng(0)
    weight = random.normal(size=(7, 5)).astype(numpy)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 7]))
    stored = ir.Value(
        name="w",
        type=ir.TensorType(dtype),
        shape=ir.Shape([7, 5]),
        const_value=ir.tensor(weight, name="w"),
    )
    down = ir.node("Cast", [x], {"to": dtype})
    product = ir.node("MatMul", [down.outputs[0], stored])
    twice = ir.node("Mul", [product.outputs[0], product.outputs[0]])
    up = ir.node("Cast", [twice.outputs[0]], {"to": ir.DataType.FLOAT})
    out = up.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([3, 5])
    nodes = [down, product, twice, up]
    graph = ir.Graph([x], [out], nodes=nodes, initializers=[stored], opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=10)
    Emulate()(model)
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    data = random.normal(size=(3, 7)).astype(np.float32)
    rounded = data.astype(numpy).astype(np.float32) @ weight.astype(np.float32)
    expected = (rounded.astype(numpy).astype(np.float32) ** 2).astype(numpy).astype(np.float32)
    assert (session.run(None, {"x": data})[0] == expected).all()


@pytest.mark.parametrize("biased", [False, True])
def test_codes_of_eight_bits_are_multiplied_in_halves_without_an_error(biased):
    """Every code, by scales that are powers of 2: the rows of the identity give the weights."""
    import onnxruntime

    codes = np.random.default_rng(1).permutation(256).astype(np.uint8).reshape(4, 2, 32)
    arrays = {"codes": codes, "scales": np.float32([[0.5, 2], [1, 8], [0.25, 4], [64, 16]])}
    arrays |= {"bias": np.float32([1, -3, 0, 1e4])} if biased else {}
    stored = {name: ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()}
    x, y = (
        ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", w]))
        for n, w in (("x", 64), ("y", 4))
    )
    inputs = [x, stored["codes"], stored["scales"], *((None, None, stored["bias"]) if biased else ())]
    sizes = {"K": 64, "N": 4, "bits": 8, "block_size": 32, "accuracy_level": 0}
    product = ir.node("MatMulNBits", inputs, sizes, domain="com.microsoft", outputs=[y])
    graph = ir.Graph(
        [x],
        [y],
        nodes=[product],
        initializers=list(stored.values()),
        opset_imports={"": 21, "com.microsoft": 1},
        name="g",
    )
    model = ir.Model(graph, ir_version=10)
    assert HalveBytes()(model).modified
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    weight = ((codes - np.float32(128)) * arrays["scales"][..., None]).reshape(4, 64).T
    expected = weight + arrays.get("bias", np.float32(0))
    np.testing.assert_array_equal(session.run(None, {"x": np.eye(64, dtype=np.float32)})[0], expected)
    assert not HalveBytes()(model).modified


def test_verify_measures_the_rounding(exported):
    """float16 has three bits more than bfloat16: the error falls by about 2^3."""
    errors = {
        precision: dijiang.verify(
            exported("tiny-python", precision=precision), TINY, tokens=200, store=False
        ).logits.rms_relative_error
        for precision in TYPES
    }
    assert 4 < errors["bf16"] / errors["fp16"] < 16


def test_emulated_model_reads_the_bundle_it_came_from(exported):
    path = exported("tiny-python", precision="bf16")
    model = load_emulated(open_bundle(path), "ort")
    assert model.bundle.path == path
    assert model.manifest.recipe.precision == "bf16"
    assert np.isfinite(model.forward(np.array([[1, 2]]), model.new_state())).all()


def test_weight_beyond_float16_is_refused_and_fits_bfloat16(edit_tensors, tmp_path):
    def grow(tensors):
        tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"][0, 0] = 1e5

    checkpoint = edit_tensors("neox-base", grow)
    with pytest.raises(dijiang.ExportError, match=r"a number of 1\.\d+e\+05 is beyond FLOAT16; .*bf16"):
        dijiang.export(checkpoint, tmp_path / "a", precision="fp16")
    assert not (tmp_path / "a").exists()
    assert dijiang.export(checkpoint, tmp_path / "b", precision="bf16").path.is_dir()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integers_for_tensorrt_meet_their_gates_on_text(exported, precision):
    bundle = exported("tiny-python", target="tensorrt", precision=precision)
    report = dijiang.verify(bundle, TINY, text=TINY / "held_out.txt", tokens=2048, store=False)
    assert report.failures == ()
    onnx.checker.check_model(onnx_file(bundle), full_check=True)


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.35), ("int4", 0.27)])
def test_integers_are_stored_as_such(exported, precision, share):
    bundle = exported("tiny-python", target="tensorrt", precision=precision)
    whole = exported("tiny-python", target="tensorrt")
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (bundle, whole)]
    assert sizes[0] < share * sizes[1]


@pytest.mark.parametrize("codes", CODES.values(), ids=["int8", "int4"])
def test_rounding_for_tensorrt_is_half_a_step_off_at_most(codes):
    random = np.random.default_rng(0)
    weight = random.normal(size=(96, 7)) * np.array([1, 1e-3, 0, 5, 1, 1, 1])
    found, scales = rounded(weight, codes, 32)
    largest = 2 ** (codes.bits - 1) - 1
    assert [block_of(rows, codes) for rows in (96, 48, 37)] == [32, 16, 0]
    assert found.dtype == np.int8
    assert (np.abs(found + 0.5) <= largest + 0.5).all()
    assert (scales > 0).all()
    assert (found[:, 2] == 0).all()
    step = np.repeat(scales, 32, 0)
    ends = (found == largest) | (found == -largest - 1)  # a shrunk scale cuts the largest off
    assert (ends | (np.abs(weight - found * step) <= step / 2 * (1 + REFITTED[codes.bits]))).all()
    plain = np.repeat(np.abs(weight).reshape(3, 32, 7).max(1) / largest, 32, 0)
    plain[plain == 0] = 1
    naive = weight - np.rint(weight / plain) * plain
    assert ((weight - found * step) ** 2).sum() <= (naive**2).sum() * (1 + 1e-5)  # scales are float32


def test_bfloat16_is_what_ml_dtypes_rounds_to():
    assert TYPES["bf16"].numpy() == ml_dtypes.bfloat16
