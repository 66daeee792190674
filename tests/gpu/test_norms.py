"""Norms on the provider: means that are large beside the deviation, and squares that overflow."""

import numpy as np
import onnx_ir as ir
import pytest

from dijiang.graph.builder import GraphBuilder
from dijiang.graph.passes.gpu import CentreNorms
from dijiang.runtime.sessions.webgpu import WEBGPU

WIDTH, EPSILON = 96, 1e-5


def normed(folder, x):
    """x [N, WIDTH] through a LayerNormalization as the webgpu graph has it."""
    b = GraphBuilder(23)
    given = b.input("x", ir.DataType.FLOAT, ["n", WIDTH])
    ones = b.constant(np.ones(WIDTH))
    b.output(
        b.op("LayerNormalization", given, ones, axis=-1, epsilon=EPSILON), "y", ir.DataType.FLOAT, ["n", WIDTH]
    )
    ir.save(CentreNorms()(b.model("norm")).model, folder / "norm.onnx")
    WEBGPU.require(0)
    (found,) = WEBGPU.open(folder / "norm.onnx", 0).run(None, {"x": x})
    return found


@pytest.mark.parametrize("mean", [0, 1, 100, 1000, -1e5])
def test_large_means_leave_the_norm_exact(tmp_path, mean):
    """What float32 itself loses: the rounding of x and of its mean."""
    x = (np.random.default_rng(0).normal(size=(7, WIDTH)) + mean).astype(np.float32)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + EPSILON)
    assert np.abs(normed(tmp_path, x) - expected).max() <= 1e-5 + 4 * abs(mean) * np.finfo(np.float32).eps


def test_squares_that_overflow_give_zero(tmp_path):
    x = np.zeros((2, WIDTH), np.float32)
    x[0, 3], x[1, :] = 1e30, np.linspace(-1, 1, WIDTH)
    found = normed(tmp_path, x)
    assert np.abs(found[0]).max() == 0
    assert np.abs(found[1]).max() > 1
