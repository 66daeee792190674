"""The kernels of the cuda graph, by their twins on the CPU, made of the same source: the numbers of float64."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from dijiang.nodes import CUDA_DOMAIN, DOMAIN
from dijiang.runtime import operators as native
from dijiang.runtime.operators import ACTIVATION_NUMBERS
from tests.native import norms
from tests.native.steps import CASES, EVEN, Case, inputs, node, oracle
from tests.native.test_kernels import of_any_shape

#: Pieces that are longer than what a block takes together, and heads that do not fit one lot.
LONGER = {
    "41-tokens": Case(64, tokens=41, heads=4, groups=4, rotary=16, mlp=33, activation="gelu"),
    "19-tokens-13-sharing": Case(80, tokens=19, heads=13, groups=1, rotary=20, batch=2, padded=True),
    "9-tokens-of-512": Case(512, tokens=9, heads=8, groups=2, rotary=128),
    "70-sharing": Case(64, heads=71, groups=1, rotary=64, scales=True),
}
ALL = EVEN | LONGER
#: Channels of the widest norm.
WIDTH = 16384
TYPES = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="no compiled operator")


@pytest.fixture(scope="module")
def session_of():
    """session_of(model): a session with our operators; tests/gpu has one on a GPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.operator_library()))
    return lambda model: onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ALL)
def test_step_meets_float64(session_of, name):
    case = ALL[name]
    expected, expected_state = oracle(case)
    output, present = session_of(node(case, CUDA_DOMAIN)).run(["output", "present"], inputs(case))
    largest = np.abs(expected_state).max(axis=(-2, -1), keepdims=True)
    assert (np.abs(present - expected_state) / largest).max() <= 1e-6
    assert np.abs(output - expected).max() <= 5e-5


@pytest.mark.parametrize("name", ["head-64", "41-tokens", "head-7-rotary-scales"])
def test_pieces_of_any_length_leave_the_same_state(session_of, name):
    case = replace(ALL[name], tokens=20)
    one = session_of(of_any_shape(node(case, CUDA_DOMAIN)))
    feeds = inputs(case)
    whole, last = one.run(["output", "present"], feeds)
    outputs, state = [], feeds["state"]
    for piece in np.split(np.arange(20), [1, 3, 19]):
        part = {key: value[:, piece] if value.shape[:2] == (1, 20) else value for key, value in feeds.items()}
        output, state = one.run(["output", "present"], part | {"state": state})
        outputs.append(output)
    assert np.abs(np.concatenate(outputs, axis=1) - whole).max() <= 5e-5
    assert np.abs(state - last).max() <= 1e-6 * np.abs(last).max()


def test_step_adds_the_projections_bias(session_of):
    case = CASES["head-64"]
    feeds = inputs(case)
    bias = np.random.default_rng(0).standard_normal(feeds["packed"].shape[-1]).astype(np.float32)
    shifted = feeds | {"packed": feeds["packed"] - bias, "packed_bias": bias}
    output, present = session_of(node(case, CUDA_DOMAIN, bias=True)).run(["output", "present"], shifted)
    expected, expected_state = oracle(case)
    assert np.abs(output - expected).max() <= 5e-5
    assert np.abs(present - expected_state).max() <= 1e-5


@pytest.mark.parametrize("name", norms.CASES)
def test_norm_meets_float64_and_its_sum_is_exact(session_of, name):
    case = norms.CASES[name]
    x = norms.inputs(case)
    y, total = session_of(norms.model(case, CUDA_DOMAIN)).run(None, x)
    assert np.array_equal(total, x["a"] + x["b"])
    assert np.abs(y - norms.oracle(case)).max() <= 5e-6


@pytest.mark.parametrize("width", [WIDTH, WIDTH + 1])
def test_norm_has_room_for_some_channels(session_of, width):
    case = norms.Case(width)
    one = session_of(norms.model(case, CUDA_DOMAIN))
    if width > WIDTH:
        with pytest.raises(Exception, match="AddNorm: more channels than the kernels have room for"):
            one.run(None, norms.inputs(case))
    else:
        # The twin adds all channels one after the other; a GPU adds as a tree.
        assert np.abs(one.run(None, norms.inputs(case))[0] - norms.oracle(case)).max() <= 3e-5


def rounding_norm(type_):
    """A norm of zeros: y is its bias in 16 bits; of b in 16 bits, whose sum with zeros is b."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "b", "one", "bias")]
    nodes = [
        helper.make_node("Cast", ["b"], ["low"], to=type_),
        helper.make_node(
            "AddNorm", ["a", "low", "one", "bias"], ["y.low", "sum"], domain=CUDA_DOMAIN, epsilon=1.0, centred=0
        ),
        helper.make_node("Cast", ["y.low"], ["y"], to=TensorProto.FLOAT),
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "sum")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(CUDA_DOMAIN, 1)]
    graph = helper.make_graph(nodes, "rounding", values, results)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


@pytest.mark.parametrize("type_", TYPES, ids=["fp16", "bf16"])
def test_numbers_of_16_bits_are_read_as_they_are_and_rounded_as_numpy_does(session_of, type_):
    one, draw = session_of(rounding_norm(type_)), np.random.default_rng(0)
    zeros = np.zeros((1, 1, WIDTH), np.float32)
    every = np.arange(1 << 16, dtype=np.uint16).view(TYPES[type_]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        ties = (every + np.roll(every, 1)) / 2
        near = (ties * draw.uniform(1 - 1e-4, 1 + 1e-4, every.size)).astype(np.float32)
        any_bits = draw.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
        for wide in np.concatenate([every, ties, near, any_bits]).reshape(-1, WIDTH):
            expected = wide.astype(TYPES[type_]).astype(np.float32)
            feeds = {"a": zeros, "one": zeros[0, 0] + 1}
            y, _ = one.run(None, feeds | {"b": zeros, "bias": wide})
            assert np.array_equal(y[0, 0], expected, equal_nan=True)
            _, total = one.run(None, feeds | {"b": expected[None, None], "bias": zeros[0, 0]})
            assert np.array_equal(total[0, 0], expected, equal_nan=True)


def test_angles_are_those_of_float64_at_any_position(session_of):
    positions = np.array([[0, 1, 2047], [1 << 31, (1 << 40) + 7, 123456789]])
    frequencies = 10000.0 ** -(np.arange(16) / 16)
    values = [
        helper.make_tensor_value_info("positions", TensorProto.INT64, None),
        helper.make_tensor_value_info("frequencies", TensorProto.DOUBLE, None),
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("cos", "sin")]
    turn = helper.make_node("RotaryAngles", ["positions", "frequencies"], ["cos", "sin"], domain=CUDA_DOMAIN)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(CUDA_DOMAIN, 1)]
    model = helper.make_model(
        helper.make_graph([turn], "turn", values, results), opset_imports=opsets, ir_version=9
    )
    feeds = {"positions": positions, "frequencies": frequencies}
    found = session_of(model.SerializeToString()).run(None, feeds)
    for one, function in zip(found, (np.cos, np.sin), strict=True):
        assert np.abs(one - function(positions[..., None] * frequencies)).max() <= 1e-7


@pytest.mark.parametrize(
    "wrong", ["projection", "log_decay", "mask", "weight", "bias", "cos", "sin", "packed_bias"]
)
def test_step_of_wrong_sizes_is_one_line(session_of, wrong):
    case = CASES["head-64"]
    feeds = inputs(case)
    feeds["packed_bias"] = np.zeros(feeds["packed"].shape[-1], np.float32)
    model = node(case, CUDA_DOMAIN, bias=True)
    feeds[wrong] = feeds[wrong][..., :-1]
    with pytest.raises(Exception, match=r"RecurrentStep: (sizes of its inputs|rotary angles)"):
        session_of(of_any_shape(model)).run(None, feeds)


@pytest.mark.parametrize("wrong", ["b", "weight", "bias"])
def test_norm_of_wrong_sizes_is_one_line(session_of, wrong):
    case = norms.CASES["norm-101"]
    feeds = norms.inputs(case)
    feeds[wrong] = feeds[wrong][..., :-1]
    with pytest.raises(Exception, match="AddNorm: sizes of its inputs"):
        session_of(of_any_shape(norms.model(case, CUDA_DOMAIN))).run(None, feeds)


@pytest.mark.parametrize("tokens", [1, 2])
def test_more_query_heads_than_there_is_room_for_is_one_line(session_of, tokens):
    case = Case(128, tokens=tokens, heads=128, groups=1)
    one, feeds = session_of(node(case, CUDA_DOMAIN)), inputs(case)
    if tokens == 1:  # a single token takes its heads in lots
        assert np.isfinite(one.run(["output"], feeds)[0]).all()
    else:
        with pytest.raises(Exception, match="RecurrentStep: more query heads than the kernels have room for"):
            one.run(None, feeds)


def test_no_tokens_are_no_work(session_of):
    case = CASES["head-64-many-rows"]
    given = inputs(case)
    feeds = {key: value[:, :0] if value.shape[:2] == (1, case.tokens) else value for key, value in given.items()}
    output, present = session_of(of_any_shape(node(case, CUDA_DOMAIN))).run(["output", "present"], feeds)
    assert output.shape == (1, 0, case.heads * case.size + case.mlp)
    assert np.array_equal(present, feeds["state"])


def test_norm_of_no_channels_is_one_line(session_of):
    """Of 2^62 rows of none a loop would not end, and Ctrl-C would not end it."""
    feeds = {"a": np.zeros((1, 5, 0), np.float32), "b": np.zeros((1, 5, 0), np.float32)}
    feeds |= {"weight": np.zeros(0, np.float32), "bias": np.zeros(0, np.float32)}
    for domain in (CUDA_DOMAIN, DOMAIN):
        one = session_of(of_any_shape(norms.model(norms.Case(16), domain)))
        with pytest.raises(Exception, match="AddNorm: no channels"):
            one.run(None, {value.name: feeds[value.name] for value in one.get_inputs()})


@pytest.mark.parametrize("name", ACTIVATION_NUMBERS)
def test_activations_of_numbers_of_any_size(session_of, name):
    """As torch has them; the twin of the GPU, and the CPU's operator."""
    import torch

    given = np.array([np.nan, -np.inf, -3e38, -1e35, -1e20, -200, -90, -1, 0, 1, 1e20, 3e38, np.inf], np.float32)
    gelu = torch.nn.functional.gelu
    known = {"relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": gelu}
    function = known | {"gelu_tanh": lambda x: gelu(x, approximate="tanh")}
    expected = function[name](torch.from_numpy(given).double()).float().numpy()
    if name != "relu":  # of -inf times 0 torch makes NaN, which is no better than 0
        given, expected = np.delete(given, 1), np.delete(expected, 1)
    case = Case(64, mlp=len(given), activation=name)
    feeds = inputs(case)
    feeds["packed"][..., -len(given) :] = given
    for domain in (CUDA_DOMAIN, DOMAIN):
        found = session_of(node(case, domain)).run(["output"], feeds)[0].reshape(-1)[-len(given) :]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30, err_msg=domain)
