"""The fine-tuning example: the module is the reference, and training leaves the decay alone."""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dijiang
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from tests.conftest import EXAMPLES, GOLDEN
from tests.random_models import POSITIONS, configs, write

SPEC = importlib.util.spec_from_file_location("finetune", EXAMPLES / "finetune.py")
finetune = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(finetune)


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
    options = f"{text} --checkpoint {checkpoint} -o {tmp_path / 'out'} --log {tmp_path / 'log.csv'}"
    options += " --steps 4 --batch 2 --length 32 --report 2 --lr 1e-3"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options.split()])
    finetune.main()
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "0", "2", "4"]
    assert float(rows[-1][2]) < float(rows[1][2]) - 0.1
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "out")
    for name in before.weights:
        same = np.array_equal(before.weights[name].astype(np.float32), after.weights[name])
        assert same == name.endswith((".D1", ".D2", ".proj.weight")), name
    assert all(decay.kind == "analytic" for decay in after.decays)
    assert dijiang.export(tmp_path / "out", tmp_path / "b", verify=False).manifest.positions_limit is None
    with pytest.raises(SystemExit, match="never overwritten"):
        finetune.main()
