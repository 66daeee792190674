"""Reading checkpoints: every layout gives the same model, every damage one clear error."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import dijiang
from dijiang.models.checkpoint import Checkpoint
from dijiang.models.convert import convert
from dijiang.models.initial import write_random
from dijiang.models.load import load_checkpoint
from tests.conftest import GOLDEN
from tests.random_models import write

BASE = GOLDEN["neox-base"]
UP = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"


def write_shards(folder, tensors, save, stem, suffix):
    names = sorted(tensors)
    shards = [f"{stem}-{i:05}-of-00003.{suffix}" for i in (1, 2, 3)]
    owners = {name: shards[i % 3] for i, name in enumerate(names)}
    for shard in shards:
        save({n: tensors[n] for n in names if owners[n] == shard}, folder / shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": owners}))
    return shards


def as_torch(tensors):
    return {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}


LAYOUTS = {
    "one pytorch file": lambda f, t: torch.save(as_torch(t), f / "pytorch_model.bin"),
    "safetensors shards": lambda f, t: write_shards(f, t, save_file, "model", "safetensors"),
    "pytorch shards": lambda f, t: write_shards(
        f, t, lambda part, path: torch.save(as_torch(part), path), "pytorch_model", "bin"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_weights(copy_of, layout):
    expected = load_checkpoint(BASE)
    folder = copy_of(BASE)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    LAYOUTS[layout](folder, tensors)
    found = load_checkpoint(folder)
    assert found.weights.keys() == expected.weights.keys()
    for name in expected.weights:
        np.testing.assert_array_equal(found.weights[name], expected.weights[name])


@pytest.mark.parametrize("layout", [*LAYOUTS, "shape", "name", "number"])
def test_hash_is_that_of_names_shapes_and_numbers_not_of_files(copy_of, layout):
    folder = copy_of(BASE)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if layout == "shape":
        tensors[UP] = tensors[UP].reshape(tensors[UP].shape[::-1])
    elif layout == "name":
        tensors[f"{UP}.other"] = tensors.pop(UP)
    elif layout == "number":
        tensors[UP][0, 0] += 1
    LAYOUTS.get(layout, LAYOUTS["safetensors shards"])(folder, tensors)
    same = Checkpoint(folder).tensors_sha256() == Checkpoint(BASE).tensors_sha256()
    assert same is (layout in LAYOUTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_keep_their_values(copy_of, dtype):
    folder = copy_of(BASE)
    tensors = as_torch(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({n: t.to(dtype) for n, t in tensors.items()}, folder / "pytorch_model.bin")
    checkpoint = Checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.read(UP).astype(np.float32), tensors[UP].to(dtype).float().numpy())


def test_bfloat16_safetensors_are_read(copy_of):
    import ml_dtypes

    folder = copy_of(BASE)
    tensors = load_file(folder / "model.safetensors")
    rounded = {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}
    save_file(rounded, folder / "model.safetensors")
    np.testing.assert_array_equal(Checkpoint(folder).read(UP), rounded[UP])


def test_all_differences_are_reported_in_one_error(edit_tensors):
    def damage(tensors):
        del tensors["gpt_neox.layers.0.attention.W_G"]
        tensors["gpt_neox.extra"] = np.zeros(3, np.float32)
        tensors[UP] = tensors[UP][:, :-1].copy()

    with pytest.raises(dijiang.CheckpointError) as caught:
        load_checkpoint(edit_tensors("neox-base", damage))
    message = str(caught.value)
    assert "1 missing: gpt_neox.layers.0.attention.W_G" in message
    assert "1 unexpected: gpt_neox.extra" in message
    assert f"1 misshapen: {UP} [" in message
    assert "(expected [" in message


def test_vanilla_checkpoint_is_told_apart(edit_tensors):
    ours = (".W_G", ".proj_matrix", ".D1", ".D2", ".group_norm.weight", ".group_norm.bias")

    def unconvert(tensors):
        for name in [n for n in tensors if n.endswith(ours)]:
            del tensors[name]

    with pytest.raises(dijiang.CheckpointError, match=r"vanilla checkpoint .*run dijiang convert"):
        load_checkpoint(edit_tensors("neox-base", unconvert))


def test_buffers_of_old_transformers_are_ignored(edit_tensors):
    def add(tensors):
        tensors["gpt_neox.layers.0.attention.masked_bias"] = np.float32([-1e9])
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    assert load_checkpoint(edit_tensors("neox-base", add)).spec == load_checkpoint(BASE).spec


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_safetensors_is_one_error(copy_of, size):
    folder = copy_of(BASE)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(dijiang.CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("size", [0, 4, 1000, -30])
def test_truncated_pytorch_file_is_one_error(copy_of, size):
    folder = copy_of(GOLDEN["neox-sequential-straddle"])
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[:size])
    with pytest.raises(dijiang.CheckpointError, match=r"pytorch_model\.bin: "):
        load_checkpoint(folder)


def test_code_inside_a_pickle_never_runs(copy_of, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder = copy_of(GOLDEN["neox-sequential-straddle"])
    torch.save({"gpt_neox.embed_in.weight": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(dijiang.CheckpointError, match="code in it is never run"):
        load_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(dijiang.CheckpointError, match=r"pytorch_model\.bin: "):
        load_checkpoint(folder)
    assert not (tmp_path / "owned").exists()


def test_pytorch_file_without_torch_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(dijiang.CheckpointError, match=r"pip install 'dijiang\[torch\]'"):
        load_checkpoint(GOLDEN["neox-sequential-straddle"])


def test_missing_shard_is_named(copy_of):
    folder = copy_of(BASE)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = write_shards(folder, tensors, save_file, "model", "safetensors")
    (folder / shards[1]).unlink()
    with pytest.raises(dijiang.CheckpointError, match=f"are missing: {shards[1]}"):
        load_checkpoint(folder)


def test_integer_weights_are_refused(edit_tensors):
    def quantize(tensors):
        tensors[UP] = tensors[UP].astype(np.int8)

    with pytest.raises(dijiang.CheckpointError, match="has dtype I8, expected float32"):
        load_checkpoint(edit_tensors("neox-base", quantize))


def test_weight_that_is_refused_when_the_graph_is_saved_is_our_error(edit_tensors, tmp_path):
    """A small one is read by the library that writes graphs, which has errors of its own."""

    def damage(tensors):
        tensors["gpt_neox.layers.0.input_layernorm.weight"][0] = np.nan

    folder = edit_tensors("neox-base", damage)
    for options in ({}, {"precision": "int4", "calibration_tokens": 64}):
        with pytest.raises(dijiang.CheckpointError, match=r"input_layernorm\.weight holds NaN or inf"):
            dijiang.export(folder, tmp_path / "b", verify=False, **options)
        assert not (tmp_path / "b").exists()


def test_packed_weights_are_told_apart(edit_tensors):
    def pack(tensors):
        tensors[UP.replace(".weight", ".qweight")] = tensors.pop(UP).astype(np.int32)

    with pytest.raises(dijiang.CheckpointError, match=r"quantized checkpoint .*qweight.*float weights"):
        load_checkpoint(edit_tensors("neox-base", pack))


def test_gguf_is_told_apart(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(dijiang.CheckpointError, match="a GGUF file, expected a folder with"):
            load_checkpoint(path)


def test_long_lists_of_differences_are_cut(edit_config):
    with pytest.raises(dijiang.CheckpointError) as caught:
        load_checkpoint(edit_config("neox-base", num_hidden_layers=9))
    assert "126 missing: " in str(caught.value)
    assert str(caught.value).count("gpt_neox.layers") == 8


def test_file_saved_from_the_base_model_is_read(tmp_path):
    config = {"model_type": "opt", "vocab_size": 9, "hidden_size": 6, "ffn_dim": 5} | {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    write(tmp_path, config)
    expected = load_checkpoint(tmp_path)
    whole = {name: expected.weights[name] for name in expected.weights}
    tensors = load_file(tmp_path / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "model.safetensors")
    found = load_checkpoint(tmp_path)
    for name in whole:
        np.testing.assert_array_equal(found.weights[name], whole[name])


def test_weights_missing_altogether(copy_of):
    folder = copy_of(BASE)
    (folder / "model.safetensors").unlink()
    with pytest.raises(dijiang.CheckpointError, match=r"no weights, expected model\.safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\0"])
def test_broken_config_is_one_error(copy_of, content):
    folder = copy_of(BASE)
    (folder / "config.json").write_text(content)
    with pytest.raises(dijiang.CheckpointError, match=r"config\.json: "):
        load_checkpoint(folder)


def test_path_that_is_no_checkpoint(tmp_path):
    with pytest.raises(dijiang.CheckpointError, match="not a folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(dijiang.CheckpointError, match=r"config\.json: not found"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_checkpoint_is_untrained_until_any_tensor_changes(vanilla, tmp_path, dtype):
    """Also where group norms stay, as LoRA leaves them."""
    convert(vanilla, tmp_path / "new")
    assert Checkpoint(tmp_path / "new").untrained
    file = tmp_path / "new" / "model.safetensors"
    tensors = load_torch(file)
    if dtype == "bfloat16":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    name = next(name for name in tensors if "query_key_value.weight" in name)
    tensors[name][0, 0] += 1
    save_torch(tensors, file)
    assert not Checkpoint(tmp_path / "new").untrained


def test_random_checkpoint_is_untrained_and_one_of_others_is_not(tmp_path):
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"vocab_size": 100, "intermediate_size": 48, "max_position_embeddings": 16, "rms_norm_eps": 1e-5}
    assert Checkpoint(write_random(config, tmp_path / "new")).untrained
    assert not Checkpoint(GOLDEN["neox-base"]).untrained
