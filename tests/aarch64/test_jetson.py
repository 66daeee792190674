"""The commands of docs/jetson.md that need no board, as they stand there: `make aarch64` emulates one."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dijiang.cli import main
from dijiang.models.initial import write_random
from dijiang.models.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "jetson.md"
#: A line of a block, without its comment.
COMMAND = re.compile(r"^    dijiang (.+?)(?: {2,}#.*)?$", re.MULTILINE)
#: What a command needs that is not here.
NEEDS_THE_BOARD = ("build", "webgpu")
#: A model of any length of text that a processor which is not here runs in seconds.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
#: One sample each: what is emulated says nothing about speed. Other tests compare its graphs with the reference.
BRIEFLY = {"bench": ["-r", "1", "--seconds", "0"], "export": ["--no-verify"]}

pytestmark = pytest.mark.emulated


def commands():
    found = [line.split() for line in COMMAND.findall(PAGE.read_text(encoding="utf-8"))]
    return [words for words in dict.fromkeys(map(tuple, found)) if not any(one in words for one in NEEDS_THE_BOARD)]


def test_page_has_the_steps_of_a_cpu():
    assert [words[0] for words in commands()] == ["export", "export", "export", "doctor", "bench", "bench"]


def test_steps_of_a_cpu_run_as_they_stand_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_random(PRESETS["pythia-70m"] | SMALL, tmp_path / "CHECKPOINT")
    for words in commands():
        done = CliRunner().invoke(main, [*words, *BRIEFLY.get(words[0], [])])
        assert done.exit_code == 0, (words, done.output)
