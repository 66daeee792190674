"""Tokenizers without tokenizer.json: made where a library can, else one line with the command."""

import json
import os
import sys

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

import dijiang
from dijiang.errors import CheckpointError
from dijiang.models.convert import convert
from dijiang.models.tokenizer import find_tokenizer, open_tokenizer
from dijiang.reading import JSON_BYTES
from dijiang.runtime.text import TextTokenizer
from tests.conftest import EXAMPLES

TEXTS = ("def main():", " a b  c", "café 漢字 🙂\n", "<s>x</s>", "", "\t")
CONFIGS = {
    "GPT-2": {"tokenizer_class": "GPT2Tokenizer"},
    "OPT": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>"}
    | {"pad_token": "<pad>", "unk_token": "</s>"},
    "prefix space": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    "added tokens": {
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": {
            "400": {"content": "<mask>", "special": True, "lstrip": True, "normalized": False}
        },
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
    },
}


def merges(folder, config):
    """vocab.json and merges.txt, and what stands beside them."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["def main(): return café " * 9], 400, special_tokens=["<s>", "<pad>", "</s>", "<|endoftext|>"]
    )
    trained.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_vocabulary_and_merges_are_read_as_transformers_reads_them(tmp_path, name):
    folder = merges(tmp_path, CONFIGS[name])
    ours = TextTokenizer(find_tokenizer(folder, 500), None)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "a <mask>b"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)


def test_bundle_gets_the_tokenizer_that_was_made(copy_of, tmp_path):
    folder = merges(copy_of(EXAMPLES / "tiny-python"), {})
    (folder / "tokenizer.json").unlink()
    bundle = dijiang.export(folder, tmp_path / "b", verify=False, graph="primitive")
    model = dijiang.load(bundle.path)
    assert model.tokenizer.decode(model.tokenizer.encode("def main")) == "def main"
    assert "tokenizer.json" in bundle.manifest.files


@pytest.mark.parametrize("kind", ["folder", "huge"])
def test_tokenizer_that_is_no_file_to_read_is_one_line(tmp_path, kind):
    file = tmp_path / "tokenizer.json"
    if kind == "folder":
        file.mkdir()
    else:
        file.touch()
        os.truncate(file, JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="unreadable"):
        find_tokenizer(tmp_path, 500)


def test_damaged_merges_are_one_line_with_the_command(vanilla, tmp_path):
    merges(vanilla, {})
    (vanilla / "merges.txt").write_text("no merge of anything\n")
    with pytest.raises(dijiang.CheckpointError, match=r"but no tokenizer\.json .*AutoTokenizer") as caught:
        convert(vanilla, tmp_path / "new")
    assert "\n" not in str(caught.value)


@pytest.fixture
def sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("def main(): return the other thing\ncafé naïve\n" * 50)
    folder = tmp_path / "spm"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return folder


def test_sentencepiece_is_read_by_transformers(sentencepiece_model):
    ours = open_tokenizer(find_tokenizer(sentencepiece_model, 300), None, dijiang.CheckpointError)
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model / "tokenizer.model"))
    for text in ("def main", "the other thing", "café", "漢"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


@pytest.mark.parametrize("missing", [True, False])
def test_sentencepiece_that_nothing_reads_is_one_line_with_the_command(vanilla, tmp_path, monkeypatch, missing):
    (vanilla / "tokenizer.model").write_bytes(b"\x0a\x0bnot a model")
    if missing:
        monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(dijiang.CheckpointError, match=r"tokenizer\.model, but no tokenizer\.json .*pip install"):
        convert(vanilla, tmp_path / "new")
    assert not (tmp_path / "new").exists()
