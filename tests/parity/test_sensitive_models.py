"""Models that lose much by rounding itself: their right exports are taken, wrong ones are not."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dijiang
from tests.random_models import write

#: Its states are 0.3 off by plain rounding to int8, and 0.8 to int4: an absolute bound refused it (ADR 0042).
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 500,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sensitive"), LLAMA, trained=False, seed=465123)


@pytest.mark.parametrize(("precision", "least"), [("int8", 0.2), ("int4", 0.7)])
def test_right_export_is_taken(checkpoint, tmp_path, precision, least):
    bundle = dijiang.export(checkpoint, tmp_path / "b", precision=precision, calibration_tokens=0)
    assert bundle.passed
    report = dijiang.verify(bundle.path, checkpoint, tokens=256, store=False)
    assert report.rounded_state > least
    assert report.passed


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("fault", ["channels", "rows"])
def test_wrong_export_is_refused(checkpoint, tmp_path, precision, fault):
    """Keys of the first layer read the channel beside theirs, or are each other's."""
    bundle = dijiang.export(checkpoint, tmp_path / "b", precision=precision, calibration_tokens=0, verify=False)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", LLAMA, trained=False, seed=465123)
    tensors = load_file(other / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith(".0.self_attn.k_proj.weight"))
    tensors[name] = np.ascontiguousarray(np.roll(tensors[name], 1, axis=1 if fault == "channels" else 0))
    save_file(tensors, other / "model.safetensors")
    report = dijiang.verify(bundle.path, other, tokens=256, store=False)
    assert "state_beyond_rounding" in {verdict.metric for verdict in report.gates if not verdict.passed}
