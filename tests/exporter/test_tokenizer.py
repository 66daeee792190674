"""The tokenizer is opened before anything is written."""

import json
from pathlib import Path

import pytest

import dijiang
from tests.conftest import EXAMPLES

TINY = EXAMPLES / "tiny-python"


def edited(folder, edit):
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    edit(tokenizer)
    file.write_text(json.dumps(tokenizer))


def test_pointer_of_git_lfs_is_named(copy_of, tmp_path):
    folder = copy_of(TINY)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(dijiang.CheckpointError, match="a pointer of Git LFS, not a tokenizer; run git lfs pull"):
        dijiang.export(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_tokenizer_of_a_larger_model_is_refused(copy_of, tmp_path):
    folder = copy_of(TINY)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    edited(folder, lambda t: t["model"]["vocab"].update({"another": vocab + 3}))
    with pytest.raises(dijiang.CheckpointError, match=f"the token 'another' has the id {vocab + 3}, but the model"):
        dijiang.export(folder, tmp_path / "b")


def test_file_of_the_checkpoint_that_cannot_be_read_is_named(copy_of, tmp_path, monkeypatch):
    folder = copy_of(TINY)
    (folder / "special_tokens_map.json").write_text("{}")
    read = Path.read_bytes

    def refuse(path):
        if path.name == "special_tokens_map.json":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(dijiang.CheckpointError, match=r"special_tokens_map\.json: unreadable \(.*denied\)"):
        dijiang.export(folder, tmp_path / "b", verify=False)
    assert not (tmp_path / "b").exists()


def test_padding_token_after_the_last_id_does_no_harm(copy_of, tmp_path):
    folder = copy_of(TINY)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    pad = {"id": vocab, "content": "[PAD]", "special": True, "normalized": False}
    pad |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    edited(folder, lambda t: t["added_tokens"].append(pad))
    bundle = dijiang.export(folder, tmp_path / "b", graph="ort")
    model = dijiang.load(bundle.path)
    assert model.tokenizer.encode("[PAD]") == [vocab]
    with pytest.raises(dijiang.InputError, match=str(vocab)):
        list(model.generate("[PAD]", max_tokens=1))
