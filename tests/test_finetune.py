"""The fine-tuning example: the module is the reference, and training leaves the decay alone."""

import importlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file

import dijiang
from dijiang.models.convert import convert
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from tests.conftest import EXAMPLES, GOLDEN
from tests.fuzz.folders import tokenizer as small_tokenizer
from tests.random_models import POSITIONS, configs, write

sys.path.insert(0, str(EXAMPLES))  # the folder of a script is where it imports from
finetune, training = map(importlib.import_module, ("finetune", "training"))


def new(folder):
    (folder / "c").mkdir()
    return folder / "c"


FAMILIES_OF_16 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300} | {
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 9), length=st.integers(1, POSITIONS))
def test_module_has_the_logits_of_the_reference(config, seed, length):
    """In float64: in float32 PyTorch's group norm of one channel is up to 300 roundings away from its bias."""
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), config, seed=seed)
        model, reference = finetune.Dijiang(folder).double(), Reference(load_checkpoint(folder))
        ids = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, length))
        with torch.no_grad():
            found = model(torch.from_numpy(ids)).numpy()
        np.testing.assert_allclose(found, reference.forward(ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_checkpoint_of_16_bits_is_saved_with_the_decay_that_was_trained_with(tmp_path, family, dtype):
    """Also D1 and D2 were rounded. As float32 they would be read as trained, and positions would end."""
    config = FAMILIES_OF_16 | {"model_type": family} | ({} if family == "gpt_neox" else {"num_key_value_heads": 1})
    folder = write(new(tmp_path), config, seed=1)
    tensors = {name: torch.from_numpy(value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(
        {n: t.to(getattr(torch, dtype)).contiguous() for n, t in tensors.items()}, folder / "model.safetensors"
    )
    model = finetune.Dijiang(folder)
    ids = np.random.default_rng(0).integers(0, 300, (2, POSITIONS))
    with torch.no_grad():
        trained = model.double()(torch.from_numpy(ids)).numpy()
    finetune.save(model, folder, tmp_path / "out")
    saved = load_checkpoint(tmp_path / "out")
    assert saved.positions_limit is None
    np.testing.assert_allclose(Reference(saved).forward(ids), trained, rtol=1e-6, atol=1e-6 * np.abs(trained).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_that_is_cast_keeps_its_decay_and_angles(tmp_path, dtype):
    folder = write(new(tmp_path), FAMILIES_OF_16 | {"model_type": "llama", "num_key_value_heads": 2}, seed=1)
    model = finetune.Dijiang(folder).to(dtype)
    for tensor in (model.gammas, model.frequencies):
        assert tensor.dtype == torch.float64
    assert not list(model.buffers())
    finetune.save(model, folder, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").positions_limit is None


def test_module_takes_names_that_an_export_takes(tmp_path):
    """A base model without its prefix, and a tied head that has the table's place."""
    config = FAMILIES_OF_16 | {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True}
    folder = write(new(tmp_path), config, seed=1)
    ids = torch.arange(20).view(2, 10)
    expected, tensors = finetune.Dijiang(folder)(ids), load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    headed = {("lm_head.weight" if n == "model.embed_tokens.weight" else n): t for n, t in tensors.items()}
    for named in (bare, headed):
        save_file({name: torch.from_numpy(tensor) for name, tensor in named.items()}, folder / "model.safetensors")
        model = finetune.Dijiang(folder)
        assert torch.equal(model(ids), expected)
        finetune.save(model, folder, tmp_path / f"out{len(named)}{'lm_head.weight' in named}")


def test_module_refuses_trained_decay():
    with pytest.raises(SystemExit, match="D1 and D2 were trained"):
        finetune.Dijiang(GOLDEN["neox-trained-decay"])


def test_script_trains_and_writes_a_checkpoint_that_exports(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for index in range(20):
        (text / f"{index:02}.txt").write_text("def f(x):\n    return x + 1\n\n" * 200)
    (text / "empty.txt").touch()
    checkpoint = shutil.copytree(EXAMPLES / "tiny-python", tmp_path / "start")
    (checkpoint / "tokenizer.model").write_bytes(b"of sentencepiece")
    options = f"{text} --checkpoint {checkpoint} -o {tmp_path / 'out'} --log {tmp_path / 'log.csv'}"
    options += " --steps 4 --batch 2 --length 32 --report 2 --lr 1e-3"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options.split()])
    finetune.main()
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "0", "2", "4"]
    assert float(rows[-1][3]) < float(rows[1][3]) - 0.1
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "out")
    for name in before.weights:
        same = np.array_equal(before.weights[name].astype(np.float32), after.weights[name])
        assert same == name.endswith((".D1", ".D2", ".proj.weight")), name
    assert all(decay.kind == "analytic" for decay in after.decays)
    assert dijiang.export(tmp_path / "out", tmp_path / "b", verify=False).manifest.positions_limit is None
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"of sentencepiece"
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"config.json", "tokenizer.json"}
    with pytest.raises(SystemExit, match="never overwritten"):
        finetune.main()


def test_older_files_of_a_tokenizer_are_read(script, tmp_path):
    """OPT's checkpoints have vocab.json and merges.txt."""
    folder = tmp_path / "converted"
    parts = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(parts["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in parts["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    script("out")
    (folder / "vocab.json").unlink()
    with pytest.raises(SystemExit, match="no tokenizer to read text with; add"):
        script("none")


def test_link_out_of_the_checkpoint_is_refused_before_the_training(script, tmp_path):
    (tmp_path / "elsewhere.md").write_text("x")
    (tmp_path / "converted" / "README.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(SystemExit, match=r"README.md: a link to a file outside of its folder"):
        script("out", "--teacher", "none")  # whose error would come next


def test_teacher_is_vanilla_and_has_the_same_tokens(script, tmp_path):
    with pytest.raises(SystemExit, match="converted: a DiJiang checkpoint, expected the vanilla one"):
        script("out", "--teacher", tmp_path / "converted")
    with pytest.raises(SystemExit, match="none: not a folder"):
        script("out", "--teacher", "none")
    wide = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL | {"vocab_size": 320}))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(SystemExit, match=r"a vocabulary of 320, that of .* has 300; give"):
        script("out", "--teacher", tmp_path / "wide")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"content": "x"}', 'no "text" that is one, found {"content"'),
        ('{"text": null}', 'no "text" that is one'),
        ('["text"]', 'no "text" that is one'),
        ("{text", "no JSON"),
    ],
)
def test_line_without_a_text_is_one_line(script, tmp_path, line, reason):
    (tmp_path / "text.jsonl").write_text("\n".join([line, *[json.dumps({"text": "x = 1\n" * 40})] * 30]))
    with pytest.raises(SystemExit, match=f"text.jsonl:1: {re.escape(reason)}"):
        script("out")


SMALL = {"model_type": "gpt_neox", "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2} | {
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(name, *options): the tensors that the script writes for a small converted model and its teacher."""
    vanilla = tmp_path / "vanilla"
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))
    model.save_pretrained(vanilla)
    (vanilla / "tokenizer.json").write_text(small_tokenizer())
    convert(vanilla, tmp_path / "converted")
    with (tmp_path / "text.jsonl").open("w") as stream:
        for number in range(400):
            stream.write(json.dumps({"text": f"def f{number}(x):\n    return x + {number}\n"}) + "\n")

    def run(name, *options):
        paths = [tmp_path / "text.jsonl", "--checkpoint", tmp_path / "converted", "-o", tmp_path / name]
        short = ["--steps", 4, "--batch", 4, "--length", 16, "--report", 2, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, [*paths, *short, *options])])
        finetune.main()
        return load_file(tmp_path / name / "model.safetensors")

    return run


def near(found, expected, atol=0.0):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=atol, err_msg=name)


def test_training_that_was_interrupted_goes_on_as_if_it_was_not(script, tmp_path, monkeypatch):
    whole, calls, measure = script("whole"), [], training.held_out_loss

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    options = ("--state", tmp_path / "state.pt", "--log", tmp_path / "log.csv")
    monkeypatch.setattr(training, "held_out_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script("again", *options)
    assert not (tmp_path / "again").exists()
    near(script("again", *options), whole)
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["step", "tokens"], ["0", "0"], ["2", "128"], ["4", "256"]]


def test_training_that_was_killed_after_a_row_writes_it_once(script, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    options = ("--state", tmp_path / "state.pt", "--log", tmp_path / "log.csv")
    script("first", *options)
    whole = (tmp_path / "log.csv").read_text()
    (tmp_path / "state.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(training.Saved, "store", killed)
        with pytest.raises(KeyboardInterrupt):
            script("again", *options)
    script("once more", *options)
    assert (tmp_path / "log.csv").read_text() == whole
    torn = whole.splitlines(keepends=True)
    for kept in ("".join(torn[:2]) + torn[2][:1], "".join(torn[:3]) + "\0\0\0", "".join(torn[:2]) + "\n"):
        (tmp_path / "log.csv").write_text(kept)
        training.drop_rows(tmp_path / "log.csv", 4)
        left = (tmp_path / "log.csv").read_text()
        assert left.endswith("\n")
        assert whole.startswith(left)
    (tmp_path / "log.csv").unlink()  # one that is away begins anew
    script("longer", *options, "--lr", 1e-4)
    assert (tmp_path / "log.csv").read_text().startswith("step,tokens")


@pytest.mark.parametrize(("options", "what"), [(("--seed", 5), "seed 0, expected 5"), (("--steps", 8), "steps 4")])
def test_state_of_another_training_is_refused(script, tmp_path, options, what):
    state = tmp_path / "state.pt"
    script("whole", "--state", state)
    kept = state.read_bytes()
    with pytest.raises(
        SystemExit, match=f"state.pt: of another training \\({what}.*; remove it, or give another --state"
    ):
        script("other", "--state", state, *options)
    assert not (tmp_path / "other").exists()
    assert state.read_bytes() == kept
    script("slower", "--state", state, "--lr", 1e-4)  # as the line about one that diverged advises


def test_state_of_another_checkpoint_or_a_torn_one_is_refused(script, tmp_path):
    state = tmp_path / "state.pt"
    script("whole", "--state", state)
    shutil.rmtree(tmp_path / "converted")
    convert(tmp_path / "vanilla", tmp_path / "converted", seed=1)
    with pytest.raises(SystemExit, match="of another training \\(checkpoint "):
        script("other", "--state", state)
    flipped = bytearray(state.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    state.write_bytes(flipped)
    with pytest.raises(SystemExit, match=r"state.pt: no whole state of a training \(archive/data/\d+ is damaged\)"):
        script("other", "--state", state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"state.pt: no whole state of a training"):
        script("other", "--state", state)


def test_files_beside_a_state_are_left_alone(script, tmp_path):
    mine = tmp_path / "state.new"
    mine.write_text("mine")
    script("whole", "--state", tmp_path / "state.pt", "--log", tmp_path / "log.csv")
    assert mine.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "state"))) == [
        "state.new",
        "state.pt",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--report", 0), "--report 0, expected 1 or more"),
        (("--steps", -1), "--steps -1, expected 1 or more"),
        (("--lr", "nan"), "--lr nan, expected a number above 0"),
        (("--seed", -1), "--seed -1, expected 0 or more"),
        (("--device", "gpu"), "--device gpu: not usable"),
        (("--align", 2), "--align 2.0, expected a share"),
        (("--log", "none/log.csv"), "none/log.csv: "),
        (("--state", "none/state.pt"), "none/state.pt: "),
        (("--checkpoint", "none"), "none: not a folder"),
    ],
)
def test_options_that_cannot_work_are_one_line_before_the_training(script, tmp_path, options, reason):
    with pytest.raises(SystemExit, match=reason):
        script("out", *options)
    assert not (tmp_path / "out").exists()


def test_positions_of_a_checkpoint_bound_the_windows(script, tmp_path):
    vanilla, converted = tmp_path / "opt", tmp_path / "opt-converted"
    config = {"hidden_size": 16, "ffn_dim": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    config |= {"max_position_embeddings": 16, "word_embed_proj_dim": 16}
    transformers.OPTForCausalLM(transformers.OPTConfig(**config)).save_pretrained(vanilla)
    (vanilla / "tokenizer.json").write_text(small_tokenizer())
    convert(vanilla, converted)
    with pytest.raises(SystemExit, match="--length 17, expected at most the 16 positions"):
        script("long", "--checkpoint", converted, "--length", 17)
    script("short", "--checkpoint", converted, "--length", 16)


def test_result_says_its_dtype_and_is_whole_or_not_there(script, tmp_path, monkeypatch):
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    (tmp_path / "converted" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))

    def full(*arguments, **options):
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(SystemExit, match=r"out.*No space left"):
            script("out")
    assert not (tmp_path / "out").exists()
    script("out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_training_that_diverges_ends_with_what_was_good(script, tmp_path):
    options = ("--state", tmp_path / "state.pt", "--steps", 8)
    with pytest.raises(SystemExit, match=r"step \d: the loss is (nan|inf); lower --lr"):
        script("wild", *options, "--lr", 1e30, "--report", 1)
    assert not (tmp_path / "wild").exists()
    assert not (tmp_path / "state.pt").exists()  # the first step's weights are lost already


def test_too_little_text_is_one_line(script):
    with pytest.raises(
        SystemExit, match=r"\d+ tokens are held out, expected more than --length 5000; give more text"
    ):
        script("long", "--length", 5000)


def test_small_batches_that_accumulate_and_layers_that_are_recomputed_give_the_same_model(script):
    near(script("parts", "--batch", 2, "--accumulate", 2, "--recompute"), script("whole"), atol=1e-5)


def test_teacher_trains_attention_alone_first_and_then_all(script, tmp_path):
    start = load_file(tmp_path / "converted" / "model.safetensors")
    options = ("--teacher", tmp_path / "vanilla", "--align")
    aligned, all_of_it = script("aligned", *options, 1.0), script("taught", *options, 0.5)
    for name, tensor in start.items():
        frozen = name.endswith(finetune.FROZEN)
        assert np.array_equal(tensor, aligned[name]) == (frozen or ".attention." not in name), name
        assert np.array_equal(tensor, all_of_it[name]) == frozen, name
    teacher = finetune.Teacher(tmp_path / "vanilla", torch.device("cpu"), torch.float32)
    batch = torch.arange(34).view(2, 17)
    before, after = (
        finetune.attention_loss(finetune.Dijiang(tmp_path / name), teacher, batch)
        for name in ("converted", "aligned")
    )
    assert after < before


def test_teacher_sees_the_attention_of_every_family(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = transformers.OPTConfig(**sizes, ffn_dim=12, word_embed_proj_dim=16, max_position_embeddings=32)
    llama = transformers.LlamaConfig(**sizes, intermediate_size=12, max_position_embeddings=32)
    for config in (opt, llama):
        folder = tmp_path / config.model_type
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        convert(folder, folder / "converted")
        teacher = finetune.Teacher(folder, torch.device("cpu"), torch.float32)
        logits, seen = teacher(torch.arange(12).view(1, 12))
        assert logits.shape == (1, 12, 61)
        assert [x.shape for layer in seen for x in layer] == [(1, 12, 16)] * 4
        loss = finetune.attention_loss(
            finetune.Dijiang(folder / "converted"), teacher, torch.arange(13).view(1, 13)
        )
        assert torch.isfinite(loss)


def test_bfloat16_is_near_float32(tmp_path):
    model = finetune.Dijiang(write(tmp_path, SMALL, seed=3))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids).float()
    exact = model(ids).detach()
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


def test_packed_texts_lose_no_token():
    texts = ["abc", "", "defgh", "ij", "klmnopqrs"]
    batches = list(training.packed(iter(texts), lambda text: [ord(c) for c in text], batch=2, length=2))
    assert "".join(chr(c) for batch in batches for c in batch.flatten().tolist()) == "abcdefghijklmnopqr"
    assert [tuple(batch.shape) for batch in batches] == [(2, 3)] * 3


def test_the_page_shows_the_stored_runs_and_the_teacher_wins_each():
    root = EXAMPLES.parent
    report = json.loads((root / "benchmarks" / "results" / "distillation.json").read_text())
    last = {(run["kind"], run["seed"]): run["rows"][-1] for run in report["runs"]}
    assert {(row[0], row[1]) for row in last.values()} == {(400, 204_800)}
    page = (EXAMPLES / "finetune.md").read_text()
    for kind, words in (("plain", "alone"), ("taught", "by its teacher")):
        losses = " | ".join(f"{last[kind, seed][3]:.3f}" for seed in range(3))
        assert f"| {words}, after 204,800 tokens | {losses} |" in page
    assert all(last["taught", seed][3] < last["plain", seed][3] for seed in range(3))
