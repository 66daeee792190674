"""Types of weights: what a file holds decides, not what a process imported before."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import dijiang
from dijiang.models.binding import ADDED
from dijiang.models.checkpoint import Checkpoint
from dijiang.models.convert import convert
from dijiang.models.load import load_checkpoint
from tests.graph.test_families import NAMED
from tests.random_models import write

COMMON = {"hidden_size": 48, "vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"max_position_embeddings": 40}
VANILLA = {
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 37, "rotary_pct": 0.5},
    "opt": {"model_type": "opt", "ffn_dim": 37, "word_embed_proj_dim": 48},
    "llama": {"model_type": "llama", "intermediate_size": 37, "num_key_value_heads": 2},
}
#: In a process of its own: command line, then what it had imported of ml_dtypes before.
PROGRAM = "import sys; from dijiang.cli import main; assert 'ml_dtypes' not in sys.modules; main(sys.argv[1:])"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def in_bfloat16(folder, family):
    """A vanilla checkpoint of a family, every tensor in bfloat16, and its tensors."""
    folder.mkdir()
    write(folder, COMMON | VANILLA[family])
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items() if not n.endswith(ADDED)}
    save_file(kept, folder / "model.safetensors")
    return kept


@pytest.mark.parametrize("family", VANILLA)
def test_bfloat16_is_converted_bit_for_bit_and_exported_in_fresh_processes(tmp_path, family):
    kept = in_bfloat16(tmp_path / "v", family)
    run("convert", tmp_path / "v", "-o", tmp_path / "new", "--no-progress", "--json")
    found = load_file(tmp_path / "new" / "model.safetensors")
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name].view(np.uint16), tensor.view(np.uint16))
    tables = {n: t.dtype for n, t in found.items() if n.endswith((".D1", ".D2"))}
    assert set(tables.values()) == {np.dtype("f4")}
    assert {t.dtype.name for n, t in found.items() if n not in tables} == {"bfloat16"}
    run("export", tmp_path / "new", "-o", tmp_path / "b", "--no-progress", "--json")
    assert dijiang.load(tmp_path / "b").bundle.passed


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex64", "int8", "bool"])
def test_type_that_is_none_of_weights_is_one_line_with_tensor_and_type(tmp_path, file, dtype):
    in_bfloat16(tmp_path / "v", "llama")
    tensors = {n: torch.ones(t.shape) for n, t in load_file(tmp_path / "v" / "model.safetensors").items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    (tmp_path / "v" / "model.safetensors").unlink()
    (save_torch if file.endswith("safetensors") else torch.save)(tensors, tmp_path / "v" / file)
    with pytest.raises(dijiang.CheckpointError, match=rf"{name} has dtype \w+, expected float32") as caught:
        convert(tmp_path / "v", tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(dijiang.CheckpointError, match=rf"{name} has dtype"):
        Checkpoint(tmp_path / "v").read(name)


def test_types_of_16_bits_side_by_side_become_float32(tmp_path):
    """q, k and v are one weight of ours; NumPy knows no common type of these two."""
    checkpoint = write(tmp_path, NAMED["llama-gqa-4"])
    file = checkpoint / "model.safetensors"
    tensors = {name: torch.from_numpy(array).to(torch.float16) for name, array in load_file(file).items()}
    for name in tensors:
        if name.endswith("k_proj.weight"):
            tensors[name] = tensors[name].to(torch.bfloat16)
    save_torch(tensors, file)
    found = load_checkpoint(checkpoint).weights["layers.0.qkv.weight"]
    parts = [tensors[f"model.layers.0.self_attn.{x}_proj.weight"].float().numpy().T for x in "qkv"]
    np.testing.assert_array_equal(found, np.concatenate(parts, axis=-1))
    dijiang.export(checkpoint, tmp_path / "b")


@pytest.mark.parametrize("options", [{"verify": False}, {"precision": "int8", "calibration_tokens": 64}], ids=str)
def test_number_that_float32_has_not_is_one_line(tmp_path, options):
    checkpoint = write(tmp_path, NAMED["llama-gqa-4"])
    file = checkpoint / "model.safetensors"
    tensors = {name: torch.from_numpy(array).to(torch.float64) for name, array in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -1e39
    save_torch(tensors, file)
    with pytest.raises(dijiang.CheckpointError, match=r"1\.mlp\.up_proj\.weight holds a number beyond float32"):
        dijiang.export(checkpoint, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_sparse_tensor_is_one_line(tmp_path):
    folder = tmp_path / "v"
    in_bfloat16(folder, "opt")
    tensors = {n: torch.ones(t.shape) for n, t in load_file(folder / "model.safetensors").items()}
    name = "model.decoder.layers.0.fc1.weight"
    tensors[name] = tensors[name].to_sparse()
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(dijiang.CheckpointError, match=f"{name} has dtype float32 sparse_coo, expected"):
        convert(folder, tmp_path / "new")


def test_bfloat16_without_ml_dtypes_says_what_to_install(tmp_path, monkeypatch):
    in_bfloat16(tmp_path / "v", "gpt_neox")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(dijiang.CheckpointError, match=r"bfloat16 needs ml_dtypes; pip install 'dijiang\[export"):
        Checkpoint(tmp_path / "v")
