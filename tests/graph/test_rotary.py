"""Rotary angles in the graph at any position."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from dijiang.graph.blocks import rotary_angles
from dijiang.graph.builder import GraphBuilder
from dijiang.models.load import load_checkpoint
from dijiang.models.rotary import inverse_frequencies
from tests.conftest import GOLDEN

FAR = [0, 1, 2047, 2048, 2049, 512_000, 10**7 - 1, 10**7, 10**9 + 7, 2048**3 - 1]


def graph_angles(spec, limit, positions):
    b = GraphBuilder(17)
    position_ids = b.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
    for name, value in zip(("cos", "sin"), rotary_angles(b, position_ids, spec, limit), strict=True):
        b.output(value, name, ir.DataType.FLOAT, ["batch", "sequence", spec.rotary_dims // 2])
    session = onnxruntime.InferenceSession(ir.to_proto(b.model("angles")).SerializeToString())
    return session.run(None, {"position_ids": np.array([positions])})


@pytest.mark.parametrize("name", ["neox-base", "tiny-python"])
def test_rotary_error_is_at_most_1e_6_at_far_positions(name):
    spec = load_checkpoint(GOLDEN[name]).spec
    cos, sin = graph_angles(spec, None, FAR)
    angles = np.outer(np.array(FAR, np.float64), inverse_frequencies(spec))
    assert np.abs(cos[0] - np.cos(angles)).max() <= 1e-6
    assert np.abs(sin[0] - np.sin(angles)).max() <= 1e-6


def test_rotary_tables_of_a_limited_model_have_one_row_a_position():
    spec = load_checkpoint(GOLDEN["neox-trained-decay"]).spec
    cos, _ = graph_angles(spec, 100, [0, 99])
    assert np.abs(cos[0, 1] - np.cos(99 * inverse_frequencies(spec))).max() <= 1e-7
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        graph_angles(spec, 100, [100])
