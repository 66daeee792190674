"""config.json of any content is one line: no traceback, no wait, no gigabytes, nothing left behind."""

import json
import os
import time

import pytest
from safetensors.numpy import load_file, save_file

import dijiang
from dijiang.models.binding import ADDED
from dijiang.models.convert import convert
from tests.conftest import GOLDEN

CONFIG = json.loads((GOLDEN["neox-base"] / "config.json").read_text())
HUGE = 10**15
INFINITE, NAN = float("inf"), float("nan")
VALUES = {
    "num_hidden_layers": [10**9, 0, -3, 2.5, INFINITE, True, None, "4"],
    "hidden_size": [HUGE, "64", None, [], 3],
    "vocab_size": [HUGE, 0],
    "num_attention_heads": [0, True, HUGE],
    "intermediate_size": [HUGE, -4],
    "max_position_embeddings": [HUGE, -1],
    "layer_norm_eps": [NAN, INFINITE, -1, "x", []],
    "rotary_pct": [NAN, INFINITE, -0.5, 3, "x", {}],
    "rotary_emb_base": [NAN, INFINITE, 0, -5, "x"],
    "rope_scaling": [[1], "linear", {"type": "yarn", "factor": 2}, {"type": []}, {"type": "linear", "factor": 0}],
    "hidden_act": ["y" * 300, [1], {}, None, "\ud800"],
    "model_type": ["x" * 300, [], None, {}],
    "eos_token_id": [-1, 10**30, "</s>", [None]],
    "tie_word_embeddings": ["yes", 1],
}
TEXTS = {
    "objects in objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "lists in lists": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": json.dumps(CONFIG)[:-1] + ', "hidden_size": ' + "9" * 5000 + "}",
    "empty": "",
    "a list": "[]",
    "cut": json.dumps(CONFIG)[:99],
}


@pytest.fixture(params=["export", "convert"])
def refused(request, copy_of, tmp_path):
    """Checks that a config is refused by a command in one line, soon, and without a trace."""
    folder = copy_of(GOLDEN["neox-base"])
    if request.param == "convert":
        tensors = load_file(folder / "model.safetensors")
        vanilla = {n: t for n, t in tensors.items() if not n.endswith(ADDED)}
        save_file(vanilla, folder / "model.safetensors")

    def check(make):
        (folder / "config.json").unlink()
        make(folder / "config.json")
        start = time.monotonic()
        with pytest.raises(dijiang.DijiangError) as caught:
            (dijiang.export if request.param == "export" else convert)(folder, tmp_path / "out")
        assert time.monotonic() - start < 5
        line = str(caught.value)
        assert "\n" not in line
        assert len(line) < 1000
        assert {path.name for path in tmp_path.iterdir()} == {folder.name}

    return check


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in VALUES.items() for value in values])
def test_value(refused, key, value):
    refused(lambda file: file.write_text(json.dumps(CONFIG | {key: value})))


@pytest.mark.parametrize("name", TEXTS)
def test_text(refused, name):
    refused(lambda file: file.write_text(TEXTS[name]))


FILES = {
    "a pipe": os.mkfifo,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a folder": lambda file: file.mkdir(),
    "UTF-16": lambda file: file.write_text(json.dumps(CONFIG), encoding="utf-16"),
    "a loop of links": lambda file: file.symlink_to(file.name),
    "a file of 65 MB": lambda file: file.write_text("{" + " " * (65 << 20) + "}"),
}


@pytest.mark.parametrize("name", FILES)
def test_file(refused, name):
    refused(FILES[name])
