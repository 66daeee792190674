"""Checkpoints as people have them: wrapped, renamed, tied, half-copied, of another format."""

import codecs
import json
import re
import shutil
import tracemalloc
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dijiang
from dijiang.cli import main
from dijiang.models import checkpoint
from dijiang.models.checkpoint import Checkpoint
from dijiang.models.convert import convert
from dijiang.models.load import load_checkpoint
from tests.conftest import EXAMPLES, GOLDEN
from tests.models.test_checkpoint import as_torch, write_shards
from tests.models.test_dtypes import in_bfloat16

BASE = GOLDEN["neox-base"]


def same(folder, expected=BASE):
    found, wanted = load_checkpoint(folder), load_checkpoint(expected)
    assert found.weights.keys() == wanted.weights.keys()
    for name, weight in wanted.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


@pytest.fixture
def unsaved(copy_of):
    """A copy of the checkpoint without its weight file, and the weights."""
    folder = copy_of(BASE)
    tensors = as_torch(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    return folder, tensors


WRAPPED = {
    "trainer": lambda t: {"epoch": 3, "state_dict": t},
    "deepspeed": lambda t: {"module": t, "global_steps": 7, "optimizer": None},
    "lightning": lambda t: {"state_dict": t, "lr_schedulers": [], "hyper_parameters": {"lr": 0.1}},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_weights_beside_the_training_state_are_found(unsaved, wrapper):
    folder, tensors = unsaved
    torch.save(WRAPPED[wrapper](tensors), folder / "pytorch_model.bin")
    same(folder)
    entry = "module" if wrapper == "deepspeed" else "state_dict"
    assert Checkpoint(folder).notes == [f"of pytorch_model.bin, only {entry!r} is read"]


def test_two_dicts_of_tensors_are_one_line(unsaved):
    folder, tensors = unsaved
    torch.save({"model": tensors, "ema": tensors}, folder / "pytorch_model.bin")
    with pytest.raises(dijiang.CheckpointError, match=r"not one dict of tensors \(ema, model\)"):
        Checkpoint(folder)


def test_files_from_before_torch_1_6_are_read_without_a_warning(unsaved, recwarn):
    folder, tensors = unsaved
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    same(folder)
    assert not recwarn.list


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "module.base_model.model."])
def test_a_prefix_before_every_name_is_no_part_of_the_names(unsaved, prefix):
    folder, tensors = unsaved
    torch.save({prefix + n: t for n, t in tensors.items()}, folder / "pytorch_model.bin")
    same(folder)
    note = f"every tensor's name begins with {prefix!r}, which is no part of it"
    assert Checkpoint(folder).notes == [note]
    bundle = dijiang.export(folder, folder / "bundle", verify=False, graph="primitive")
    assert bundle.manifest.warnings == (note,)


def test_model_inside_of_a_model_has_its_own_names_and_a_tied_one_keeps_its_prefix(unsaved, tmp_path):
    folder, tensors = unsaved
    torch.save({"model." + n: t for n, t in tensors.items()}, folder / "pytorch_model.bin")
    same(folder)
    file, _ = tied(tmp_path)
    assert "model.embed_tokens.weight" in Checkpoint(file.parent).shapes


@pytest.mark.parametrize("wrapper", checkpoint.WRAPPERS)
def test_what_wrappers_put_into_names_is_no_part_of_them(unsaved, wrapper):
    """Of the whole, under DataParallel, and of each layer."""
    folder, tensors = unsaved
    of_layers = {re.sub(r"(layers\.\d+\.)", rf"\1{wrapper}", name): tensor for name, tensor in tensors.items()}
    for named in (
        {wrapper + n: t for n, t in tensors.items()},
        of_layers,
        {f"module.{n}": t for n, t in of_layers.items()},
    ):
        torch.save(named, folder / "pytorch_model.bin")
        same(folder)
        assert f"tensors' names hold {wrapper!r}, which is no part of them" in Checkpoint(folder).notes
    torch.save(of_layers | tensors, folder / "pytorch_model.bin")
    with pytest.raises(dijiang.CheckpointError, match="two tensors of one name"):
        Checkpoint(folder)


def test_moving_average_of_torch_is_read(unsaved):
    folder, tensors = unsaved
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2)).state_dict()
    count = {name: tensor for name, tensor in averaged.items() if name == "n_averaged"}
    torch.save({f"module.{n}": t for n, t in tensors.items()} | count, folder / "pytorch_model.bin")
    assert len(count) == 1
    same(folder)


@pytest.mark.parametrize("part", checkpoint.ADAPTER)
def test_adapter_that_was_not_merged_is_named(unsaved, part):
    folder, tensors = unsaved
    name = next(name for name in tensors if name.endswith("query_key_value.weight"))
    torch.save(tensors | {name.replace(".weight", f"{part}weight"): torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(dijiang.CheckpointError, match=r"is of an adapter; merge the adapter first"):
        Checkpoint(folder)


@pytest.mark.parametrize("verb", [dijiang.export, convert])
def test_adapter_beside_its_base_is_refused(vanilla, tmp_path, verb):
    (vanilla / "adapter_config.json").write_text("{}")
    with pytest.raises(dijiang.CheckpointError, match=r"would not be applied; merge the adapter first"):
        verb(vanilla, tmp_path / "b")


def test_weights_that_are_not_read_are_noted(unsaved):
    folder, tensors = unsaved
    torch.save({name: tensor * 2 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    save_file({name: tensor.numpy() for name, tensor in tensors.items()}, folder / "model.safetensors")
    same(folder)
    assert Checkpoint(folder).notes == ["model.safetensors is read, and pytorch_model.bin is not"]


@pytest.mark.parametrize("file", ["chat_template.jinja", "special_tokens_map.json"])
def test_link_out_of_a_checkpoint_copies_nothing(vanilla, tmp_path, file):
    """A stranger's archive may hold one, to a file that would be published with the bundle."""
    (tmp_path / "secret").write_bytes((EXAMPLES / "tiny-python" / "tokenizer.json").read_bytes())
    (vanilla / file).unlink(missing_ok=True)
    (vanilla / file).symlink_to(tmp_path / "secret")
    with pytest.raises(dijiang.CheckpointError, match=f"{file}: a link to a file outside of its folder; put"):
        convert(vanilla, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    folder = shutil.copytree(EXAMPLES / "tiny-python", tmp_path / "tiny")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(dijiang.CheckpointError, match="jinja: a link to a file outside of its folder; put"):
        dijiang.export(folder, tmp_path / "b", verify=False)
    (folder / "chat_template.jinja").unlink()
    (folder / "real").write_text("{{ messages }}")
    (folder / "chat_template.jinja").symlink_to("real")
    dijiang.export(folder, tmp_path / "b", verify=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_makes_bytes_of_any_size_is_not_opened(unsaved, zipped):
    folder, tensors = unsaved
    torch.save(tensors | {"x": bytearray(10)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(dijiang.CheckpointError, match=r"holds a bytearray; save the checkpoint as safetensors"):
        Checkpoint(folder)


def test_order_of_bytes_that_is_none_is_not_read(unsaved):
    """In a zip an entry of a few kilobytes may be gigabytes."""
    folder, tensors = unsaved
    torch.save(tensors, folder / "plain")
    with ZipFile(folder / "plain") as plain, ZipFile(folder / "pytorch_model.bin", "w", ZIP_STORED) as packed:
        for entry in plain.infolist():
            bomb = entry.filename.endswith("/byteorder")
            packed.writestr(
                entry.filename, bytes(1 << 28) if bomb else plain.read(entry), ZIP_DEFLATED if bomb else ZIP_STORED
            )
    tracemalloc.start()
    with pytest.raises(dijiang.CheckpointError, match=r"byteorder of 268435456 bytes; save"):
        Checkpoint(folder)
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


@pytest.mark.parametrize("file", ["__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp", "zero_to_fp32.py"])
def test_checkpoints_of_distributed_training_say_what_makes_them_usable(unsaved, file):
    folder, _ = unsaved
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"")
    with pytest.raises(dijiang.CheckpointError, match=r"dcp_to_torch FOLDER pytorch_model|python zero_to_fp32.py"):
        Checkpoint(folder)


def test_tensors_of_a_stale_shard_are_not_read(unsaved):
    """A folder that was downloaded twice: the index says which shards are the model."""
    folder, tensors = unsaved
    tensors = {n: t.numpy() for n, t in tensors.items()}
    shards = write_shards(folder, tensors, save_file, "model", "safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    owner = load_file(folder / shards[0])
    foreign = next(n for n, shard in index.items() if shard != shards[0])
    save_file(owner | {foreign: np.zeros_like(tensors[foreign])}, folder / shards[0])
    save_file({"other.weight": np.zeros(3, "f4")}, folder / "model-00001-of-00002.safetensors")
    same(folder)
    note = "1 tensors are not read: model.safetensors.index.json names other files for them, or none"
    assert Checkpoint(folder).notes == [note]


def test_what_was_done_to_read_a_checkpoint_stands_in_the_report_of_convert(vanilla, tmp_path, capsys):
    tensors = load_file(vanilla / "model.safetensors")
    save_file({f"module.{n}": t for n, t in tensors.items()}, vanilla / "model.safetensors")
    main(["convert", str(vanilla), "-o", str(tmp_path / "new")], standalone_mode=False)
    assert "every tensor's name begins with 'module.', which is no part of it" in capsys.readouterr().out


def test_head_of_gpt_neox_may_have_the_name_that_transformers_5_has_in_memory(unsaved):
    folder, tensors = unsaved
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    same(folder)


def test_converted_head_has_its_published_name(vanilla, tmp_path):
    found = load_file(vanilla / "model.safetensors")
    found["lm_head.weight"] = found.pop("embed_out.weight")
    save_file(found, vanilla / "model.safetensors")
    convert(vanilla, tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    np.testing.assert_array_equal(written["embed_out.weight"], found["lm_head.weight"])
    assert "lm_head.weight" not in written


def test_both_names_of_the_head_at_once_are_one_line(unsaved):
    folder, tensors = unsaved
    torch.save(tensors | {"lm_head.weight": tensors["embed_out.weight"] + 1}, folder / "pytorch_model.bin")
    with pytest.raises(dijiang.CheckpointError, match=r"1 unexpected: lm_head\.weight"):
        load_checkpoint(folder)


DAMAGED = {
    "no map": ({}, "has no weight_map"),
    "a list": ({"weight_map": ["a"]}, "has no weight_map"),
    "numbers": ({"weight_map": {"a": 1}}, "has no weight_map"),
    "a path outside": ({"weight_map": {"a": "../model.safetensors"}}, r"leave the folder: \.\./model\.safetensors"),
    "a missing shard": ({"weight_map": {"a": "gone.safetensors"}}, "are missing: gone.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_index_is_one_line(unsaved, damage):
    folder, _ = unsaved
    index, reason = DAMAGED[damage]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(dijiang.CheckpointError, match=reason) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_tensor_that_its_shard_lacks_is_one_line(unsaved):
    folder, tensors = unsaved
    write_shards(folder, {n: t.numpy() for n, t in tensors.items()}, save_file, "model", "safetensors")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["forgotten"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(dijiang.CheckpointError, match="names forgotten in model-00001"):
        Checkpoint(folder)


OTHER_FORMATS = {
    "adapter_config.json": "merge the adapter first",
    "consolidated.00.pth": "convert_llama_weights_to_hf",
    "weights.00.npz": "the checkpoint that MLX converted",
}


@pytest.mark.parametrize("file", OTHER_FORMATS)
@pytest.mark.parametrize("config", [True, False])
def test_another_format_is_named_with_what_makes_it_usable(unsaved, file, config):
    """PEFT and Meta write no config.json."""
    folder, _ = unsaved
    (folder / file).write_bytes(b"{}")
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(dijiang.CheckpointError, match=OTHER_FORMATS[file]):
        Checkpoint(folder)


def test_floats_that_transformers_read_from_gguf_are_a_checkpoint(edit_config):
    same(edit_config("neox-base", quantization_config={"quant_method": "gguf"}))


def test_weights_of_other_quantization_methods_are_refused(edit_config):
    with pytest.raises(dijiang.CheckpointError, match="a quantized checkpoint"):
        Checkpoint(edit_config("neox-base", quantization_config={"quant_method": "gptq", "bits": 4}))


def test_converted_checkpoint_is_not_called_quantized(tmp_path):
    in_bfloat16(tmp_path / "v", "llama")
    file = tmp_path / "v" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    (tmp_path / "v" / "chat_template.jinja").write_text("{{ messages }}")
    convert(tmp_path / "v", tmp_path / "new")
    assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_files_of_windows_that_begin_with_a_byte_order_mark_are_read(edit_config):
    folder = edit_config("neox-base")
    spec = load_checkpoint(folder).spec
    config = folder / "config.json"
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    assert load_checkpoint(folder).spec == spec


def test_end_token_that_is_none_is_named_with_its_file(edit_config):
    folder = edit_config("neox-base", eos_token_id=5)
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(
        dijiang.CheckpointError, match=r"^generation_config\.json: eos_token_id is '</s>', expected"
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize(("ends", "expected"), [(7, (7,)), ([7, 9], (7, 9)), ([], ()), (None, (5,))])
def test_end_tokens_of_the_generation_config_go_first(edit_config, ends, expected):
    folder = edit_config("neox-base", eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.7}))
    assert load_checkpoint(folder).spec.eos_token_ids == expected


def test_end_tokens_and_sampling_of_the_authors_are_shown(edit_config, tmp_path, capsys):
    folder = edit_config("neox-base", eos_token_id=5)
    sampling = {"temperature": 0.7, "top_p": 0.9, "do_sample": True}
    stored = sampling | {"eos_token_id": [7, 9], "transformers_version": "5"}
    (folder / "generation_config.json").write_text(json.dumps(stored))
    bundle = dijiang.export(folder, tmp_path / "b", verify=False, graph="primitive")
    assert bundle.sampling == sampling
    main(["inspect", str(bundle.path)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "7, 9" in shown
    assert "do_sample True, temperature 0.7, top_p 0.9" in shown
    main(["inspect", str(bundle.path), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["sampling"] == sampling


@pytest.mark.parametrize("wrong", ["</s>", [1, "x"], True, 1.5, {"id": 1}])
def test_end_tokens_that_are_no_ids_are_one_line(edit_config, wrong):
    with pytest.raises(dijiang.CheckpointError, match=r"eos_token_id is .*, expected token ids"):
        load_checkpoint(edit_config("neox-base", eos_token_id=wrong))


def tied(tmp_path):
    """A tied LLaMA in bfloat16, converted."""
    in_bfloat16(tmp_path / "v", "llama")
    file = tmp_path / "v" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "v" / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file(tensors, tmp_path / "v" / "model.safetensors")
    convert(tmp_path / "v", tmp_path / "new")
    return tmp_path / "new" / "model.safetensors", load_file(tmp_path / "new" / "model.safetensors")


def test_tied_table_may_have_either_name_or_both(tmp_path):
    file, tensors = tied(tmp_path)
    table = tensors["model.embed_tokens.weight"]
    expected = load_checkpoint(file.parent).weights["embed.weight"]
    rest = {n: t for n, t in tensors.items() if n != "model.embed_tokens.weight"}
    for stored in ({"lm_head.weight": table}, {"lm_head.weight": table, "model.embed_tokens.weight": table}):
        save_file(rest | {n: t.copy() for n, t in stored.items()}, file)
        found = load_checkpoint(file.parent)
        np.testing.assert_array_equal(found.weights["embed.weight"], expected)
        np.testing.assert_array_equal(found.weights["head.weight"], expected.T)


def test_tied_table_and_another_head_are_refused(tmp_path):
    file, tensors = tied(tmp_path)
    head = tensors["model.embed_tokens.weight"].copy()
    head[3, 2] += 1
    save_file(tensors | {"lm_head.weight": head}, file)
    with pytest.raises(dijiang.CheckpointError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        load_checkpoint(file.parent)
