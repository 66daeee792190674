"""Right exports of models that hold only zeros somewhere, as pruned ones do, or numbers beyond a type."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dijiang
from dijiang.parity.difference import relative
from tests.random_models import POSITIONS, write

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 131}
SHAPE |= {"max_position_embeddings": POSITIONS}
FAMILIES = {
    "llama": {"intermediate_size": 96, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "gpt_neox": {"intermediate_size": 96, "rotary_pct": 0.25, "use_parallel_residual": True},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}
#: Tensors that become 0.
NOTHING = {
    "values of a layer": r"layers\.0\.\w+\.(v_proj|query_key_value)\.",
    "values": r"\.(v_proj|query_key_value)\.",
    "last norm": r"(model\.norm|final_layer_?norm)\.",
    "all": r"(weight|bias)$",
}


def changed(folder, family, tensors, factor):
    """A random model with some tensors multiplied; how many."""
    folder.mkdir()
    write(folder, {"model_type": family, **SHAPE, **FAMILIES[family]})
    found = load_file(folder / "model.safetensors")
    names = [name for name in found if re.search(tensors, name) and not name.endswith(("D1", "D2"))]
    save_file(found | {name: found[name] * np.float32(factor) for name in names}, folder / "model.safetensors")
    return len(names)


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("tensors", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize(
    ("family", "precision", "target"),
    [
        *((family, "fp32", "onnxruntime") for family in FAMILIES),
        ("llama", "int4", "onnxruntime"),
        ("opt", "int8", "tensorrt"),
    ],
)
def test_what_does_nothing_is_exported(tmp_path, family, tensors, precision, target):
    assert changed(tmp_path / "c", family, tensors, 0) > 0
    bundle = dijiang.export(tmp_path / "c", tmp_path / "b", precision=precision, target=target)
    assert bundle.passed
    json.loads((bundle.path / "parity.json").read_text(), parse_constant=no_constant)


def test_numbers_beyond_float16_are_named_and_their_report_is_json(tmp_path):
    changed(tmp_path / "c", "llama", r"norm\.weight", 1e3)
    with pytest.raises(
        dijiang.ParityError, match=r"layer 1 is the worst \(nan off\); a number is too large for its"
    ):
        dijiang.export(tmp_path / "c", tmp_path / "b", precision="fp16")
    dijiang.export(tmp_path / "c", tmp_path / "b", precision="fp16", verify=False)
    report = dijiang.verify(tmp_path / "b", tmp_path / "c")
    stored = json.loads((tmp_path / "b" / "parity.json").read_text(), parse_constant=no_constant)
    assert np.isnan(report.metrics["rms_relative_error"])
    assert stored["logits"]["rms_relative_error"] is None
    assert not stored["passed"]


@pytest.mark.parametrize(("error", "size", "found"), [(0, 0, 0), (1e-40, 0, 1e-10), (2, 4, 0.5), (1, 0, 1e30)])
def test_an_error_of_nothing_is_a_number(error, size, found):
    assert relative(error, size) == pytest.approx(found)
    assert np.isnan(relative(np.nan, size))
