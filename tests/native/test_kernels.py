"""Every instruction set of this machine: the bits of the plain twin, and the numbers of float64."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dijiang.runtime import operators as native
from tests.native import norms, products
from tests.native.steps import CASES, inputs, node, oracle, triples

ROOT = Path(__file__).parents[2]
FAST = [name for name in native.isa_names() if name != "plain"]

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="no compiled operator")


@pytest.fixture(scope="module")
def results(tmp_path_factory, exported):
    """Instruction set -> what its process computed."""
    folder, found = tmp_path_factory.mktemp("steps"), {}
    bundle = exported("neox-base", graph="native")
    for name in native.isa_names():
        path = folder / f"{name}.npz"
        command = [sys.executable, "-m", "tests.native.steps", str(path), str(bundle)]
        subprocess.run(command, env={**os.environ, "DIJIANG_ISA": name}, cwd=ROOT, check=True)
        found[name] = dict(np.load(path))
    return found


def same_bits(a, b):
    """Whether two float32 arrays are equal bit for bit; a NaN is as good as another."""
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


def test_forced_set_is_the_one_that_runs(results):
    assert {name: str(found["isa"]) for name, found in results.items()} == {n: n for n in results}


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("case", CASES)
def test_step_has_the_bits_of_the_plain_twin(results, case, isa):
    for part in ("output", "present"):
        name = f"{case}.{part}"
        assert same_bits(results[isa][name], results["plain"][name]), part


@pytest.mark.parametrize("case", CASES)
def test_step_meets_float64(results, case):
    output, present = oracle(CASES[case])
    found = results["plain"]
    # Values of a dead group are up to 1e25: errors of a state are relative to the largest in it.
    largest = np.abs(present).max(axis=(-2, -1), keepdims=True)
    assert (np.abs(found[f"{case}.present"] - present) / largest).max() <= 1e-6
    assert np.abs(found[f"{case}.output"] - output).max() <= 5e-5


def test_dead_group_is_its_bias(results):
    """The case overflows for real: what is left of the first head is bias x silu(gate)."""
    case = CASES["overflow"]
    x, size = inputs(case), case.size
    gate = x["packed"][0, :, 12 * size : 13 * size].astype(np.float64)
    expected = x["bias"][:size] * gate / (1 + np.exp(-gate))
    assert np.abs(results["plain"]["overflow.output"][0, :, :size] - expected).max() <= 1e-6


@pytest.mark.parametrize("isa", native.isa_names())
@pytest.mark.parametrize("case", products.CASES)
def test_row_of_a_product_has_the_bits_of_the_plain_twin_whatever_the_rows(results, case, isa):
    expected = results["plain"][f"{case}.{products.ROWS}-rows"]
    for rows in (products.ROWS, *products.FEWER):
        assert same_bits(results[isa][f"{case}.{rows}-rows"], expected[:rows]), rows


@pytest.mark.parametrize("case", products.CASES)
def test_product_meets_float64(results, case):
    product = products.Product.of(products.CASES[case])
    error, step = np.abs(results["plain"][f"{case}.{products.ROWS}-rows"] - product.oracle()), product.step()
    # One code of a row may be rounded to its other side; all else is float32.
    assert (error <= 1.01 * step + 1e-6).all()
    assert np.median(error / np.where(step, step, 1)) < 1e-3


@pytest.mark.parametrize("isa", native.isa_names())
@pytest.mark.parametrize("case", norms.CASES)
def test_row_of_a_norm_has_the_bits_of_the_plain_twin_whatever_the_rows(results, case, isa):
    found, expected = results[isa], results["plain"][f"{case}.output"]
    assert same_bits(found[f"{case}.output"], expected)
    assert same_bits(found[f"{case}.first"], expected[:, :1])


@pytest.mark.parametrize("case", norms.CASES)
def test_norm_meets_float64_and_its_sum_is_exact(results, case):
    x, found = norms.inputs(norms.CASES[case]), results["plain"]
    assert np.array_equal(found[f"{case}.sum"], x["a"] + x["b"])
    assert np.abs(found[f"{case}.output"] - norms.oracle(norms.CASES[case])).max() <= 5e-6


@pytest.mark.parametrize("wrong", ["b", "weight", "bias"])
def test_norm_of_wrong_sizes_is_one_line(wrong):
    case = norms.CASES["norm-16"] if wrong != "bias" else norms.CASES["norm-101"]
    feeds = norms.inputs(case)
    feeds[wrong] = feeds[wrong][..., :-1]
    session = session_of(of_any_shape(norms.model(case)))
    with pytest.raises(Exception, match="AddNorm: sizes of its inputs"):
        session.run(None, feeds)


def of_any_shape(data):
    """A model without the shapes of its inputs and outputs."""
    model = onnx.load_from_string(data)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    return model.SerializeToString()


def test_no_rows_are_no_work():
    feeds = norms.inputs(norms.CASES["norm-16"])
    feeds |= {name: feeds[name][:, :0] for name in ("a", "b")}
    assert session_of(norms.model(norms.CASES["norm-16"])).run(["y"], feeds)[0].shape == (1, 0, 16)
    product = products.Product.of(products.CASES["8-bits"])
    assert session_of(product.model()).run(None, {"x": product.x[None, :0]})[0].shape == (1, 0, 128)
    case = CASES["head-64-many-rows"]
    feeds = {
        name: value[:, :0] if value.shape[:2] == (1, case.tokens) else value for name, value in inputs(case).items()
    }
    output, present = session_of(of_any_shape(node(case))).run(None, feeds)
    assert output.shape == (1, 0, case.heads * case.size + case.mlp)
    assert np.array_equal(present, feeds["state"])


WRONG = {
    "bits": ({"bits": 3}, "K, N, bits, block_size and rotation do not go together"),
    "block": ({"block_size": 48}, "do not go together"),
    "long-block": ({"block_size": 512}, "do not go together"),
    "rotation": ({"rotation": 256}, "do not go together"),
    "width": ({"K": 192}, "width of the input, expected K"),
    "outputs": ({"N": 160}, "shapes of codes, scales and bias do not fit K and N"),
    "finer-blocks": ({"block_size": 16}, "shapes of codes, scales and bias do not fit K and N"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_product_of_wrong_attributes_is_one_line(wrong):
    changed, message = WRONG[wrong]
    with pytest.raises(Exception, match=f"MatMul: .*{message}") as refused:
        run_product(products.Product.of(products.CASES["8-bits"]), **changed)
    assert type(refused.value).__module__.startswith(("onnxruntime", "builtins"))


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("at", [(0, 0), (-1, -1)])
def test_product_of_a_corrupted_scale_is_one_line(scale, at):
    product = products.Product.of(products.CASES["4-bits-odd-outputs-bias"])
    product.scales[at] = scale
    with pytest.raises(Exception, match="MatMul: a scale is 0 or no number"):
        run_product(product)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_product_of_what_is_no_number_is_none(value):
    """As a float matmul: the row that holds it is lost, and no other."""
    product = products.Product.of(products.CASES["8-bits"])
    clean = run_product(product)
    product.x[3, 7] = value
    found = run_product(product)
    assert np.isnan(found[3]).all()
    assert same_bits(np.delete(found, 3, 0), np.delete(clean, 3, 0))


def session_of(model):
    """A model that may have our nodes, in this process; errors are raised, not logged."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.operator_library()))
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def run_product(product, **changed):
    """Output [ROWS, out] in this process."""
    return session_of(product.model(**changed)).run(None, {"x": product.x[None]})[0][0]


@pytest.mark.parametrize("isa", FAST)
def test_bundle_has_the_bits_of_the_plain_twin(results, isa):
    names = [name for name in results["plain"] if name.startswith("bundle.")]
    assert len(names) > 1
    assert all(same_bits(results[isa][name], results["plain"][name]) for name in names)


@pytest.mark.parametrize("isa", FAST)
def test_multiply_add_has_the_bits_of_the_plain_twin(results, isa):
    assert same_bits(results[isa]["multiply_add"], results["plain"]["multiply_add"])


def rounded(exact):
    """The float32 nearest to a Fraction, ties to even."""
    near = np.float32(float(exact))
    candidates = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)] + [near]
    finite = [value for value in candidates if np.isfinite(value)]
    return min(finite, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))


def test_plain_multiply_add_rounds_once(results):
    with np.errstate(all="ignore"):
        a, b, c = triples()
        whole = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
        whole &= np.abs(a.astype(float) * b + c) < 1e38
    chosen = np.flatnonzero(whole)
    chosen = np.concatenate([chosen[:: len(chosen) // 4000], chosen[-4:]])
    found = results["plain"]["multiply_add"][chosen]
    expected = [rounded(Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))) for i in chosen]
    assert np.array_equal(found, np.array(expected))
