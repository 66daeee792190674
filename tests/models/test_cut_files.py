"""A file that is cut, or written to, while it is read: one line, never SIGBUS, and no weights of two files."""

import json
import os
import shutil
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from safetensors.numpy import load_file

import dijiang
from dijiang.errors import CheckpointError
from dijiang.models import tensor_files
from dijiang.models.binding import ADDED
from dijiang.models.checkpoint import Checkpoint
from dijiang.models.convert import convert
from dijiang.models.tensor_files import TorchFile
from tests.conftest import GOLDEN
from tests.kill import child
from tests.models.test_checkpoint import as_torch

#: Reads before the file is cut.
READS = 5


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("verb", ["export", "convert"])
def test_file_that_is_cut_while_it_is_read_is_one_line(verb, file, request, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue("vanilla") if verb == "convert" else GOLDEN["neox-base"], folder)
    if file.endswith(".bin"):
        torch.save(as_torch(load_file(folder / "model.safetensors")), folder / file)
        (folder / "model.safetensors").unlink()
    reads, read = [], Checkpoint.read

    def cut(self, name):
        reads.append(name)
        if len(reads) == READS:
            os.truncate(folder / file, 4096)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", cut)
    write = {"export": lambda: dijiang.export(folder, tmp_path / "b", verify=False)}
    write["convert"] = lambda: convert(folder, tmp_path / "b")
    status, _ = child(write[verb])
    assert status == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "it was cut at byte" in lines[0]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_checkpoint_that_is_written_over_while_it_is_read_is_refused(file, tmp_path, monkeypatch):
    """By a training that saves to the same folder: the same shapes, so that nothing else shows it."""
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN["neox-base"], folder)
    tensors = load_file(folder / "model.safetensors")
    if file.endswith(".bin"):
        (folder / "model.safetensors").unlink()
        torch.save(as_torch(tensors), folder / file)
    reads, read = [], Checkpoint.read

    def write(self, name):
        reads.append(name)
        if len(reads) == READS and file == "config.json":
            config = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
        elif len(reads) == READS:
            data = (folder / file).read_bytes()
            (folder / file).write_bytes(data[:-2000] + bytes(2000))
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", write)
    with pytest.raises(CheckpointError, match="it was written to while it was read; start again"):
        dijiang.export(folder, tmp_path / "b", verify=False)
    assert not (tmp_path / "b").exists()


def test_config_that_holds_no_number_is_the_same_each_time(tmp_path):
    folder = shutil.copytree(GOLDEN["neox-base"], tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"unknown": float("nan")}))
    assert Checkpoint(folder).sha256()


def test_parameters_of_a_vanilla_file_are_not_read_before_they_are_needed(vanilla, monkeypatch):
    """Shapes come without data, so a large file costs nothing to look at."""
    torch.save(as_torch(load_file(vanilla / "model.safetensors")), vanilla / "pytorch_model.bin")
    (vanilla / "model.safetensors").unlink()
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read"))
    checkpoint = Checkpoint(vanilla)
    assert not any(name.endswith(ADDED) for name in checkpoint.shapes)


def test_strided_tensors_of_a_zip_are_read_as_torch_reads_them(tmp_path):
    """A transposed one, a part of another's storage, one without numbers, one number, an expanded one."""
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "transposed": whole.t(),
        "part": whole[1:3, 2:5],
        "empty": torch.empty(0, 3),
        "number": torch.tensor(7.0),
        "expanded": torch.tensor([3.0]).expand(5),
        "half": whole.to(torch.bfloat16)[::2],
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert found.shape == tuple(tensor.shape)
        assert found.astype("f4").tolist() == tensor.float().tolist()


def test_zip_that_another_tool_packed_is_read_by_torch(tmp_path):
    tensors = {"weight": torch.arange(4096, dtype=torch.float32).reshape(64, 64)}
    torch.save(tensors, tmp_path / "plain")
    with ZipFile(tmp_path / "plain") as plain, ZipFile(tmp_path / "pytorch_model.bin", "w", ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint(tmp_path).read("weight").tolist() == tensors["weight"].tolist()


def test_flipped_bit_in_a_pytorch_file_is_one_error(vanilla, tmp_path):
    """Its zip has checksums, which torch does not compare, and can be told not to write."""
    tensors = as_torch(load_file(vanilla / "model.safetensors"))
    for sums in (True, False):
        torch.serialization.set_crc32_options(sums)
        try:
            torch.save(tensors, tmp_path / "pytorch_model.bin")
        finally:
            torch.serialization.set_crc32_options(True)
        assert TorchFile(tmp_path / "pytorch_model.bin").shapes.keys() == tensors.keys()
        data = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "pytorch_model.bin").write_bytes(data)
        if sums:
            with pytest.raises(dijiang.CheckpointError, match=r"pytorch_model/data/\d+ is not what was written"):
                TorchFile(tmp_path / "pytorch_model.bin")


def test_what_is_packed_is_not_unpacked_to_be_compared(tmp_path, monkeypatch):
    """A megabyte can be a terabyte of zeros."""
    with ZipFile(tmp_path / "pytorch_model.bin", "w", ZIP_DEFLATED) as packed:
        packed.writestr("archive/data/0", bytes(1 << 24))
    monkeypatch.setattr(ZipFile, "open", lambda *_: pytest.fail("it was unpacked"))
    assert tensor_files._torn(tmp_path / "pytorch_model.bin") is None
