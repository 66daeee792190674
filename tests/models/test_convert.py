"""convert and init: what they write, and what they refuse."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import dijiang
from dijiang.models import store
from dijiang.models.binding import ADDED
from dijiang.models.convert import convert
from dijiang.models.decay import initial_gamma
from dijiang.models.initial import init, projection
from dijiang.models.load import FAMILIES, load_checkpoint
from dijiang.models.presets import PRESETS, size
from tests.conftest import GOLDEN
from tests.random_models import write

LLAMA = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 37, "vocab_size": 61} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}


def tensors_of(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_converted_neox_has_the_published_layout(vanilla, tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(vanilla / "tokenizer.json"))
    tokenizer = (vanilla / "tokenizer.json").read_bytes()
    report = convert(vanilla, tmp_path / "new", seed=3)
    found = tensors_of(tmp_path / "new")
    published = load_file(GOLDEN["neox-base"] / "model.safetensors")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in published.items()}
    for name, tensor in tensors_of(vanilla).items():
        np.testing.assert_array_equal(found[name], tensor)
    layer = "gpt_neox.layers.1.attention."
    for table in ("D1", "D2"):
        np.testing.assert_allclose(found[layer + table], published[layer + table], rtol=1e-5)
    assert (found[layer + "group_norm.weight"] == 1).all()
    assert (found[layer + "group_norm.bias"] == 0).all()
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == tokenizer
    assert (report.family, report.kept) == (
        "gpt_neox",
        sum(t.size for t in tensors_of(vanilla).values()),
    )


def test_converted_model_is_analytic_and_exports(vanilla, tmp_path):
    convert(vanilla, tmp_path / "new")
    assert all(decay.kind == "analytic" for decay in load_checkpoint(tmp_path / "new").decays)
    bundle = dijiang.export(tmp_path / "new", tmp_path / "b")
    assert bundle.manifest.positions_limit is None
    assert bundle.parity["passed"]


def test_projection_is_a_dct_with_weighted_columns():
    from scipy.fft import dct

    matrix = projection((16, 16), np.random.default_rng(5))
    weights = np.random.default_rng(5).standard_normal(16)
    np.testing.assert_allclose(matrix, dct(np.eye(16), axis=0, norm="ortho") @ np.diag(weights), atol=1e-12)


def test_gate_is_xavier_uniform_of_gain_2_to_the_minus_2_5(vanilla, tmp_path):
    convert(vanilla, tmp_path / "new")
    gate = tensors_of(tmp_path / "new")["gpt_neox.layers.0.attention.W_G"]
    bound = 2**-2.5 * (6 / 128) ** 0.5
    assert 0.95 * bound < np.abs(gate).max() <= bound
    assert gate.std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_disk_that_fills_is_one_line_and_leaves_nothing(vanilla, tmp_path):
    """A real failing write: no file may have more than 10 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(dijiang.CheckpointError, match=r"cannot be written \(.*large"):
            convert(vanilla, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [vanilla.name]


def test_negative_seed_is_refused_before_anything_is_written(vanilla, tmp_path):
    for make, what in ((convert, vanilla), (init, "pythia-70m")):
        with pytest.raises(dijiang.InputError, match="seed is -1, expected 0 or more"):
            make(what, tmp_path / "new", seed=-1)
    assert not (tmp_path / "new").exists()


def test_seed_decides_what_is_drawn(vanilla, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(vanilla, tmp_path / name, seed=seed)
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    drawn = [n for n in a if n.endswith((".proj_matrix", ".W_G"))]
    assert all((a[n] == b[n]).all() for n in a)
    assert all((a[n] != c[n]).any() for n in drawn)
    first, second = (f"gpt_neox.layers.{i}.attention.proj_matrix" for i in (0, 1))
    assert (a[first] != a[second]).any()


def test_half_precision_keeps_its_dtype_and_the_decay_is_float32(edit_tensors, tmp_path):
    def halve(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].astype(np.float16)
        for name in [n for n in tensors if n.endswith(ADDED)]:
            del tensors[name]

    convert(edit_tensors("neox-base", halve), tmp_path / "new")
    found = tensors_of(tmp_path / "new")
    assert {t.dtype for n, t in found.items() if n.endswith((".D1", ".D2"))} == {np.dtype("f4")}
    assert {t.dtype for n, t in found.items() if not n.endswith((".D1", ".D2"))} == {np.dtype("f2")}


def test_new_tensors_are_like_the_layers_and_sizes_are_those_of_each_tensor(edit_tensors, tmp_path, monkeypatch):
    """A float16 embedding beside float32 layers: the index, the progress and the room on the disk count both."""

    def mixed(tensors):
        for name in [n for n in tensors if n.endswith(ADDED)]:
            del tensors[name]
        for name in ("embed_out.weight", "gpt_neox.embed_in.weight"):
            tensors[name] = tensors[name].astype(np.float16)

    seen = []
    monkeypatch.setattr(store, "SHARD_BYTES", 50_000)
    vanilla = edit_tensors("neox-base", mixed)
    convert(vanilla, tmp_path / "new", progress=lambda stage, done, total: seen.append((done, total)))
    found = tensors_of(tmp_path / "new")
    assert {t.dtype for n, t in found.items() if "embed" not in n} == {np.dtype("f4")}
    total = sum(tensor.nbytes for tensor in found.values())
    assert seen[-1] == (total, total)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total


def test_grouped_heads_get_one_decay_a_kv_head(tmp_path):
    (tmp_path / "v").mkdir()
    write(tmp_path / "v", LLAMA)
    tensors = load_file(tmp_path / "v" / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith(ADDED)}, tmp_path / "v" / "model.safetensors")
    convert(tmp_path / "v", tmp_path / "new")
    found = tensors_of(tmp_path / "new")["model.layers.0.self_attn.D1"]
    assert found.shape == (1, 2, 40, 1)
    np.testing.assert_allclose(found[0, :, 1, 0], initial_gamma(2), rtol=1e-7)


def test_shards_are_small_and_hold_the_same(vanilla, tmp_path, monkeypatch):
    convert(vanilla, tmp_path / "one")
    monkeypatch.setattr(store, "SHARD_BYTES", 50_000)
    seen = []
    convert(vanilla, tmp_path / "many", progress=lambda stage, done, total: seen.append((done, total)))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert all((one[n] == many[n]).all() for n in one)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == len(seen) > 5
    assert all(f.stat().st_size < 55_000 for f in files)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in many.values())
    loaded = load_checkpoint(tmp_path / "many")
    assert loaded.weights.keys() == load_checkpoint(tmp_path / "one").weights.keys()


def test_base_model_file_of_pytorch_gets_the_names_of_the_family(tmp_path):
    """As OPT-350M is published: pytorch_model.bin, float16, names without `model.`."""
    config = {"model_type": "opt", "vocab_size": 61, "hidden_size": 24, "ffn_dim": 31} | {
        "word_embed_proj_dim": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
        "do_layer_norm_before": False,
    }
    (tmp_path / "v").mkdir()
    write(tmp_path / "v", config)
    tensors = load_file(tmp_path / "v" / "model.safetensors")
    (tmp_path / "v" / "model.safetensors").unlink()
    halves = {n: torch.from_numpy(t).half() for n, t in tensors.items() if not n.endswith(ADDED)}
    base = {n.removeprefix("model."): t for n, t in halves.items()}
    extra = {"decoder.version": torch.tensor([3.0])}
    extra["lm_head.weight"] = base["decoder.embed_tokens.weight"]
    torch.save(base | extra, tmp_path / "v" / "pytorch_model.bin")
    convert(tmp_path / "v", tmp_path / "new")
    found = tensors_of(tmp_path / "new")
    for name, tensor in halves.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
    assert load_checkpoint(tmp_path / "new").positions_limit == 40


def test_decay_of_4096_positions_is_still_analytic(tmp_path):
    """gamma^-4095 of LLaMA2's first head is past float32: the file holds inf, and loads."""
    (tmp_path / "v").mkdir()
    write(tmp_path / "v", LLAMA)
    (tmp_path / "v" / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 4096}))
    tensors = load_file(tmp_path / "v" / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.endswith(ADDED)}
    save_file(kept, tmp_path / "v" / "model.safetensors")
    convert(tmp_path / "v", tmp_path / "new")
    assert np.isinf(tensors_of(tmp_path / "new")["model.layers.0.self_attn.D2"]).any()
    decays = load_checkpoint(tmp_path / "new").decays
    assert [decay.kind for decay in decays] == ["analytic"] * 2
    np.testing.assert_array_equal(decays[0].gamma, initial_gamma(2))


def test_new_rotary_spelling_is_written_as_the_published_code_reads_it(vanilla, tmp_path):
    config = json.loads((vanilla / "config.json").read_text())
    old = {key: config.pop(key) for key in ("rotary_pct", "rotary_emb_base")}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": old["rotary_pct"]}
    (vanilla / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    convert(vanilla, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {key: written[key] for key in old} == old
    assert written["rope_parameters"] == rope


def test_disk_that_fills_while_writing_is_one_clear_error(vanilla, tmp_path):
    """A real failing write: the child may not write files of more than 100 kB."""
    script = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from dijiang.cli import main\n"
        f"main(['convert', {str(vanilla)!r}, '-o', {str(tmp_path / 'new')!r}])\n"
    )
    before = sorted(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def refused(tmp_path, match, make):
    (tmp_path / "out").mkdir()
    with pytest.raises(dijiang.CheckpointError, match=match) as caught:
        make(tmp_path / "out" / "new")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_converted_checkpoint_is_refused(tmp_path):
    refused(tmp_path, "already a DiJiang checkpoint", lambda out: convert(GOLDEN["neox-base"], out))


def test_config_that_disagrees_with_the_weights_is_refused(vanilla, tmp_path):
    config = json.loads((vanilla / "config.json").read_text())
    (vanilla / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(tmp_path, "12 missing: gpt_neox.layers.2", lambda out: convert(vanilla, out))


def test_unsupported_architecture_lists_what_is_supported(vanilla, tmp_path):
    config = json.loads((vanilla / "config.json").read_text())
    (vanilla / "config.json").write_text(json.dumps(config | {"model_type": "gptj"}))
    refused(
        tmp_path,
        "'gptj' is not supported, expected one of gpt_neox, llama, opt",
        lambda out: convert(vanilla, out),
    )


def test_quantized_checkpoint_is_refused(vanilla, tmp_path):
    config = json.loads((vanilla / "config.json").read_text())
    changed = config | {"quantization_config": {"quant_method": "awq"}}
    (vanilla / "config.json").write_text(json.dumps(changed))
    refused(tmp_path, "quantized checkpoint", lambda out: convert(vanilla, out))


def test_non_finite_weight_is_refused_and_leaves_nothing(vanilla, tmp_path):
    tensors = load_file(vanilla / "model.safetensors")
    tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"][2, 1] = np.nan
    save_file(tensors, vanilla / "model.safetensors")
    refused(tmp_path, "holds NaN or inf", lambda out: convert(vanilla, out))


def test_full_disk_is_known_before_anything_is_written(vanilla, tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 4096}))
    refused(tmp_path, r"it needs 0\.\d\d GB, 0\.00 GB are free", lambda out: convert(vanilla, out))


def test_output_that_exists_is_never_overwritten(vanilla, tmp_path):
    with pytest.raises(dijiang.CheckpointError, match="never overwritten"):
        convert(vanilla, tmp_path)


def test_missing_parents_are_made_and_files_have_ordinary_permissions(vanilla, tmp_path):
    convert(vanilla, tmp_path / "a" / "b" / "new")
    found = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "a" / "b" / "new").iterdir()}
    folder = (tmp_path / "a" / "b" / "new").stat().st_mode & 0o777
    assert set(found) == {"config.json", "model.safetensors"}
    assert set(found.values()) == {folder & 0o666}


#: Parameters of the vanilla models, from their model cards and papers.
PUBLISHED = {
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-2.8b": 2_775_208_960,
    "opt-350m": 331_196_416,
    "tinyllama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_the_published_number_of_parameters(preset):
    config, found = PRESETS[preset], size(preset)
    d = config["hidden_size"]
    head = d // config["num_attention_heads"]
    added = config["num_hidden_layers"] * (d * d + head * head + 2 * d)
    assert found.parameters - added == PUBLISHED[preset]
    kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    assert found.state_bytes == config["num_hidden_layers"] * kv_heads * head * head * 4
    width = config.get("word_embed_proj_dim", d)
    tied = config["vocab_size"] * width if FAMILIES[config["model_type"]].spec(config).tied_embeddings else 0
    assert found.weight_bytes["fp16"] == 2 * (found.parameters + tied)  # a graph reads it in two ways
    assert found.weight_bytes["int4"] < found.weight_bytes["int8"] < found.weight_bytes["fp16"]


@pytest.mark.parametrize("name", ["pythia-70m", "opt-350m", "llama2-7b"])
def test_bytes_of_a_preset_are_those_that_export_writes(tmp_path, monkeypatch, name):
    """The shares of the head, of the embedding and of the layers are those of small models."""
    layers = {"pythia-70m": 3, "opt-350m": 8, "llama2-7b": 4}[name]
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": layers, "vocab_size": 8192}
    shape |= {"num_key_value_heads": 8, "intermediate_size": 1408, "ffn_dim": 1408, "max_position_embeddings": 64}
    kept = PRESETS[name] | {key: value for key, value in shape.items() if key in PRESETS[name]}
    monkeypatch.setitem(PRESETS, name, kept)
    init(name, tmp_path / "new", dtype="float16", seed=1)
    for precision, told in size(name).weight_bytes.items():
        options = {"calibration_tokens": 0} if precision.startswith("int") else {}
        options |= {"precision": precision, "verify": False}
        bundle = dijiang.export(tmp_path / "new", tmp_path / precision, **options)
        tables = bundle.data_bytes - told  # of the graphs: the same for models of any size
        assert -0.01 * told < tables < 2.5e6, precision


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_init_writes_a_checkpoint_that_loads(tmp_path, monkeypatch, dtype):
    tiny = PRESETS["tinyllama-1.1b"] | {"num_hidden_layers": 1, "vocab_size": 50, "hidden_size": 128}
    monkeypatch.setitem(PRESETS, "tinyllama-1.1b", tiny | {"intermediate_size": 48})
    init("tinyllama-1.1b", tmp_path / "new", dtype=dtype, seed=1)
    model = load_checkpoint(tmp_path / "new")
    assert str(model.weights["embed.weight"].dtype) == dtype
    assert model.weights["layers.0.D1"].dtype == np.float32
    assert model.decays[0].kind == "analytic"
    assert model.parameters == size("tinyllama-1.1b").parameters
    assert json.loads((tmp_path / "new" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize(("preset", "dtype"), [("pythia-7b", "float16"), ("pythia-70m", "int8")])
def test_init_lists_what_it_knows(tmp_path, preset, dtype):
    with pytest.raises(dijiang.InputError, match=r"is unknown, expected one of (pythia-70m|float32), "):
        init(preset, tmp_path / "new", dtype=dtype)
