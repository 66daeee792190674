"""Real faults are refused at any scale, and float rounding is not."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dijiang
from dijiang.recipe import PRECISIONS
from tests.conftest import RUNNABLE
from tests.graph.test_families import LLAMA, NEOX
from tests.random_models import write

CONFIGS = {
    "neox": NEOX | {"num_attention_heads": 3, "hidden_act": "gelu"},
    "llama": LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True},
}
NEOX_LAYER, LLAMA_LAYER = "gpt_neox.layers.1.", "model.layers.1."


def change(name, edit):
    """A fault of one tensor."""

    def plant(tensors, config):
        tensors[name] = np.ascontiguousarray(edit(tensors[name].copy()))

    return plant


def put(index, value):
    def edit(tensor):
        tensor[index] = value(tensor[index])
        return tensor

    return edit


def swap(axis, a, b, width=1):
    """Two neighbouring groups of rows or columns in each other's place."""

    def edit(tensor):
        order = np.arange(tensor.shape[axis])
        first, second = order[a : a + width].copy(), order[b : b + width].copy()
        order[a : a + width], order[b : b + width] = second, first
        return np.take(tensor, order, axis)

    return edit


def layers_swapped(tensors, config):
    for name in list(tensors):
        if ".layers.0.mlp" in name:
            other = name.replace(".layers.0.", ".layers.1.")
            tensors[name], tensors[other] = tensors[other].copy(), tensors[name].copy()


FAULTS = {
    "neox": {
        "one weight 5 % off": change(NEOX_LAYER + "mlp.dense_h_to_4h.weight", put((3, 5), lambda x: 1.05 * x)),
        "missing bias": change(NEOX_LAYER + "attention.dense.bias", np.zeros_like),
        "sign of a bias": change(NEOX_LAYER + "mlp.dense_4h_to_h.bias", put(2, lambda x: -x)),
        "swapped heads": change(NEOX_LAYER + "attention.query_key_value.weight", swap(0, 0, 24, 24)),
        "swapped q and k": change(NEOX_LAYER + "attention.query_key_value.weight", swap(0, 0, 8, 8)),
        "gate 0.1 % off": change(NEOX_LAYER + "attention.W_G", lambda x: x * np.float32(1.001)),
        "gate transposed": change(NEOX_LAYER + "attention.W_G", np.transpose),
        "P rows swapped": change(NEOX_LAYER + "attention.proj_matrix", swap(0, 0, 1)),
        "group norm": change(NEOX_LAYER + "attention.group_norm.weight", put(7, lambda x: -x)),
        "norm without bias": change(NEOX_LAYER + "input_layernorm.bias", np.zeros_like),
        "final norm 0.01 % off": change("gpt_neox.final_layer_norm.weight", lambda x: x * np.float32(1.0001)),
        "head rows swapped": change("embed_out.weight", swap(0, 5, 6)),
        "layers swapped": layers_swapped,
    },
    "llama": {
        "kv heads swapped": change(LLAMA_LAYER + "self_attn.k_proj.weight", swap(0, 0, 6, 6)),
        "one value column": change(LLAMA_LAYER + "self_attn.v_proj.weight", put((slice(None), 3), lambda x: -x)),
        "missing bias": change(LLAMA_LAYER + "self_attn.o_proj.bias", np.zeros_like),
        "gate and up swapped": lambda tensors, config: tensors.update(
            {
                LLAMA_LAYER + "mlp.gate_proj.weight": tensors[LLAMA_LAYER + "mlp.up_proj.weight"].copy(),
                LLAMA_LAYER + "mlp.up_proj.weight": tensors[LLAMA_LAYER + "mlp.gate_proj.weight"].copy(),
            }
        ),
        "norm 0.01 % off": change("model.norm.weight", lambda x: x * np.float32(1.0001)),
        "other rotary base": lambda tensors, config: config.update(rope_theta=10100.0),
        "other epsilon": lambda tensors, config: config.update(rms_norm_eps=2e-5),
    },
}
CASES = [(family, name) for family, faults in FAULTS.items() for name in faults]
#: Those that rounding does not hide in models of 24 and 48 channels.
LARGE = (
    *("swapped heads", "layers swapped", "swapped q and k", "P rows swapped", "norm without bias"),
    *("head rows swapped", "kv heads swapped", "one value column"),
)
SEEN = {"fp16": LARGE, "bf16": LARGE, "int8": LARGE, "int4": LARGE[:2]}
ROUNDED = [(precision, *case) for precision, seen in SEEN.items() for case in CASES if case[1] in seen]


def scaled(folder, scale):
    """Logits, and the numbers on the way to them, of another size."""
    tensors = load_file(folder / "model.safetensors")
    head = "embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight"
    for name in (head, *(n for n in tensors if n.endswith(("down_proj.weight", "dense_4h_to_h.weight")))):
        tensors[name] *= np.float32(scale)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_there_are_twenty_faults():
    assert len(CASES) == 20


@pytest.mark.parametrize("scale", [0.01, 1, 100])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_right_bundle_of_any_scale_and_precision_passes(tmp_path, family, precision, scale):
    (tmp_path / "c").mkdir()
    checkpoint = scaled(write(tmp_path / "c", CONFIGS[family], seed=1), scale)
    assert dijiang.export(checkpoint, tmp_path / "b", precision=precision).passed


def broken(folder, family, fault, scale):
    """A checkpoint, and the same with a fault."""
    (folder / "c").mkdir()
    checkpoint = scaled(write(folder / "c", CONFIGS[family], seed=1), scale)
    wrong = shutil.copytree(checkpoint, folder / "broken")
    tensors, config = load_file(wrong / "model.safetensors"), json.loads((wrong / "config.json").read_text())
    FAULTS[family][fault](tensors, config)
    save_file(tensors, wrong / "model.safetensors")
    (wrong / "config.json").write_text(json.dumps(config))
    return checkpoint, wrong


@pytest.mark.parametrize("scale", [0.01, 100])
@pytest.mark.parametrize(("family", "fault"), CASES)
def test_planted_fault_of_any_scale_is_refused(tmp_path, family, fault, scale):
    checkpoint, wrong = broken(tmp_path, family, fault, scale)
    bundle = dijiang.export(wrong, tmp_path / "b", graph="primitive", verify=False)
    with pytest.raises(dijiang.ParityError):
        dijiang.verify(bundle.path, checkpoint).require()


@pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
@pytest.mark.parametrize("scale", [0.01, 100])
@pytest.mark.parametrize(("precision", "family", "fault"), ROUNDED)
def test_planted_fault_that_rounding_does_not_hide_is_refused(tmp_path, precision, family, fault, scale):
    checkpoint, wrong = broken(tmp_path, family, fault, scale)
    bundle = dijiang.export(wrong, tmp_path / "b", precision=precision, graph="ort", verify=False)
    with pytest.raises(dijiang.ParityError, match="_over_rounding"):
        dijiang.verify(bundle.path, checkpoint).require()
