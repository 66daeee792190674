"""Providers are tried, not believed."""

import onnx
import pytest
from onnx import TensorProto, helper

from dijiang.doctor import probes

FLOAT = TensorProto.FLOAT
NODES = {
    "MATMUL": (("MatMul", "", {}), {"a": [4, 4], "b": [4, 4]}, {"y": [4, 4]}),
    "LINEAR_ATTENTION": (
        (
            "LinearAttention",
            "com.microsoft",
            {"q_num_heads": 1, "kv_num_heads": 1, "update_rule": "gated", "scale": 1.0},
        ),
        {"q": [1, 1, 64], "k": [1, 1, 64], "v": [1, 1, 64], "s": [1, 1, 64, 64], "d": [1, 1, 1]},
        {"y": [1, 1, 64], "t": [1, 1, 64, 64]},
    ),
}


@pytest.mark.parametrize("name", NODES)
def test_stored_model_is_the_one_node_it_is_said_to_be(name):
    (kind, domain, attributes), inputs, outputs = NODES[name]
    node = helper.make_node(kind, list(inputs), list(outputs), domain=domain or None, **attributes)
    values = [
        [helper.make_tensor_value_info(n, FLOAT, shape) for n, shape in side.items()] for side in (inputs, outputs)
    ]
    model = onnx.load(getattr(probes, name))
    expected = helper.make_graph([node], "probe", *values)
    assert model.graph.SerializeToString() == expected.SerializeToString()


def test_cpu_runs():
    tried = probes.probe("CPUExecutionProvider")
    assert (tried.runs, tried.reason) == (True, None if tried.linear_attention else tried.reason)


def test_a_provider_that_is_not_there_says_why():
    tried = probes.probe("CUDAExecutionProvider")
    if tried.runs:
        pytest.skip("this machine has a CUDA device")
    assert not tried.linear_attention
    assert tried.reason


def test_a_crash_of_the_child_is_a_reason(monkeypatch):
    monkeypatch.setattr(probes.sys, "executable", "false")
    tried = probes.probe("CPUExecutionProvider")
    assert (tried.runs, tried.reason) == (False, "the process ended with status 1")


def test_every_listed_provider_but_the_remote_one_is_tried():
    import onnxruntime

    tried = [p.provider for p in probes.probe_providers()]
    listed = [p for p in onnxruntime.get_available_providers() if p != probes.REMOTE]
    assert tried == listed + [probes.WEBGPU.name] * bool(probes.installed(probes.PACKAGE))
