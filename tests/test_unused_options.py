"""What an option, an argument or a path may be: none is ignored, and what can be known at once is said at once."""

import json
import math
import os

import click
import numpy as np
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bench.render import write
from dijiang.cli import main
from dijiang.commands import print_json
from dijiang.exporter import export as exporter
from dijiang.runtime.sessions import cpu
from dijiang.runtime.state_folder import StateFolder
from tests.conftest import EXAMPLES

TINY = EXAMPLES / "tiny-python"


@pytest.fixture
def tiny(exported):
    return exported("tiny-python")


@pytest.fixture
def cli(tmp_path, monkeypatch, tiny):
    """cli(line): the finished command, in a new folder; {b} is a bundle, {c} its checkpoint."""
    monkeypatch.chdir(tmp_path)
    return lambda line, **more: CliRunner().invoke(main, line.format(b=tiny, c=TINY).split(), **more)


#: A command line, and what would change nothing in it.
UNUSED = {
    "bench {b} --threshold 3": "--threshold would change nothing without --compare",
    "bench {b} --cache int8": "--cache would change nothing without --baseline",
    "bench {b} --compare a b": "bundles would change nothing beside --compare",
    "bench --compare a b -p 3": "-p would change nothing beside --compare",
    "bench --compare a b --plot x.png": "--plot would change nothing beside --compare",
    "bench {b} --explain -o json": "--explain would stand before the json on stdout",
    "inspect {b} --layer 1": "--layer would change nothing without --draw FILE",
    "inspect {b} --graph onnx": "--graph would change nothing without --draw FILE",
    "init --list -o new": "--output would change nothing beside --list",
    "init pythia-70m --list": "preset would change nothing beside --list",
    "init --list --seed 1": "--seed would change nothing beside --list",
    "run {b} --jsonl in -o out -p x": "--prompt would change nothing beside --jsonl",
    "run {b} --jsonl in -o out --prompt=": "--prompt would change nothing beside --jsonl",
    "run {b} --jsonl in -o out --speculate": "--speculate would change nothing beside --jsonl",
    "run {b} --jsonl in -o out --json": "--json would change nothing beside --jsonl",
    "run {b} -p x --revision v1": "--revision would change nothing: no model is the Hub's",
    "verify {b} --against {c} --revision v1": "--revision would change nothing: no model is the Hub's",
    "chat {b} --load-state s --system x": "--system would change nothing beside --load-state",
    "serve {b} --prefix-disk 9": "--prefix-disk would change nothing without --prefix-folder",
    "serve {b} --conversation-disk 9": "--conversation-disk would change nothing without --conversation-folder",
    "export {c} -o new --no-verify -t 1": "--threads would change nothing beside --no-verify",
    "bench {b} -f x.png --plot x.png": "--file and --plot have one name",
    "eval {b} --tasks a --include none": "'--include': Directory 'none' does not exist",
}


@pytest.mark.parametrize("line", UNUSED)
def test_option_that_would_change_nothing_is_wrong_usage(cli, tmp_path, line):
    done = cli(line)
    assert (done.exit_code, done.stdout) == (2, "")
    assert UNUSED[line] in done.stderr
    assert [*tmp_path.iterdir()] == []


#: A command line, and why it is refused before anything is loaded, measured, written or compared.
AT_ONCE = {
    "bench {b} -f none/x": "none/x: cannot be written",
    "bench {b} -f .": "'.' cannot be the name of a file",
    "bench {b} --plot none/x.png": "none/x.png: cannot be written",
    "bench --compare old new -f folder/../new": "new is a report that is compared; choose another file",
    "bench {b} --provider bogus": "execution provider 'bogus' is not available",
    "bench {b} --seconds nan": "10 repetitions and nan seconds: expected at least 1 and 0",
    "bench {b} --seconds inf": "10 repetitions and inf seconds: expected at least 1 and 0",
    "run {b} -p x --save-state none/x": "none/x: cannot be written",
    "run {b} -p x --save-state /dev/null": "something stands there that is no file",
    "run {b} -p x --save-state folder": "folder: cannot be written (Is a directory)",
    "verify {b} --against {c} --html none/x": "none/x: cannot be written",
    "verify {b} --against {c} --html folder": "folder: cannot be written (Is a directory)",
    "inspect {b} --draw x.png": "x.png: the picture is SVG",
    "export {c} -o new --text latin": "latin: cannot be read",
    "export {c} -o new --text short": "short: 1 token, expected at least 2",
    "export {c} -o new --text pipe": "pipe: cannot be read (not a regular file)",
    "export {c} -o new --decay analytic --repair-decay": "there is none to repair",
    "export {c} -o new --precision int8 --calibration-tokens 99999999999999": "the export needs",
}


@pytest.mark.parametrize("line", AT_ONCE)
def test_what_can_be_known_at_once_is_said_at_once(cli, tmp_path, monkeypatch, line):
    def late(*_, **__):
        raise AssertionError("it was begun")

    for owner, name in (
        (cpu.CpuSession, "__init__"),
        (exporter, "_save"),
        (exporter.pipeline, "calibrate"),
    ):
        monkeypatch.setattr(owner, name, late)
    monkeypatch.setattr("dijiang.bench.runner.run_sides", late)
    monkeypatch.setattr("dijiang.parity.verify.compare_bundle", late)
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin").write_bytes(b"def main():\n" * 100 + b"caf\xe9\n")
    (tmp_path / "short").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    there = sorted(tmp_path.iterdir())
    done = cli(line)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.output
    assert AT_ONCE[line] in done.stderr
    assert sorted(tmp_path.iterdir()) == there


def test_number_that_json_cannot_say_is_null():
    @click.command()
    def command():
        print_json({"a": [math.nan, 1.5, {"b": (math.inf, "x")}], 3: None})

    assert CliRunner().invoke(command).stdout == '{"a": [null, 1.5, {"b": [null, "x"]}], "3": null}\n'


def test_mark_of_the_byte_order_is_no_text(cli, tmp_path, tiny):
    for name, mark in (("with", b"\xef\xbb\xbf"), ("without", b"")):
        (tmp_path / name).write_bytes(mark + b"def main():\r\n    return 1\n")
        (tmp_path / f"{name}.jsonl").write_bytes(mark + b'{"prompt": "def main("}\n')
        assert cli(f"run {{b}} -n 4 --jsonl {name}.jsonl -o {name}.out").exit_code == 0
    assert (tmp_path / "with.out").read_bytes() == (tmp_path / "without.out").read_bytes()
    said = [cli("run {b} -n 4", input=mark + b"def main(").stdout for mark in (b"\xef\xbb\xbf", b"")]
    assert said[0] == said[1]
    found = [
        dijiang.verify(tiny, TINY, text=tmp_path / name, tokens=10**12, store=False) for name in ("with", "without")
    ]
    assert found[0].tokens == found[1].tokens
    assert found[0].logits == found[1].logits


def test_name_that_is_no_unicode_is_written_as_an_escape(tmp_path, tiny):
    text = tmp_path / os.fsdecode(b"t\xff")
    text.write_text("def main():\n    return 1\n")
    page, said = tmp_path / "page.html", ["verify", tiny, "--against", TINY, "--text", text, "--no-store", "--html"]
    done = CliRunner().invoke(main, [*map(str, said), str(page)])
    assert done.exit_code == 0, done.output
    assert "t\\udcff" in page.read_text(encoding="utf-8")
    write(f"{text}", page)
    assert page.read_text(encoding="utf-8").endswith("t\\udcff\n")


def test_filters_without_a_temperature_are_said(cli):
    greedy = cli("run {b} -p def -n 4")
    filtered = cli("run {b} -p def -n 4 --top-p 0.5 --top-k 3")
    assert filtered.stdout == greedy.stdout
    assert filtered.stderr.startswith("[--top-k, --top-p: of no effect at temperature 0")
    assert "no effect" not in greedy.stderr
    assert "no effect" not in cli("run {b} -p def -n 4 --top-p 0.5 --temperature 0.7").stderr


def test_answers_that_are_there_are_said(cli, tmp_path):
    (tmp_path / "in").write_text('{"prompt": "def main("}\n')
    assert cli("run {b} -n 4 --jsonl in -o out").stderr == ""
    assert cli("run {b} -n 4 --jsonl in -o out").stderr == (
        "[out: 1 of 1 prompts are answered; remove it to answer them anew]\n"
    )
    done = cli("run {b} -n 9 --jsonl in -o out")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "line 1 was answered by another bundle or with other options" in done.stderr


def test_answers_go_into_files_only(cli, tmp_path):
    (tmp_path / "in").write_text('{"prompt": "def main("}\n')
    done = cli("run {b} --jsonl in -o /dev/full")  # it can be read, too, for ever
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "/dev/full: cannot be written (not a regular file)" in done.stderr


def test_folder_of_states_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(dijiang.InputError, match=r"cannot be used .nothing can be written there."):
        StateFolder(tmp_path, 1 << 20)


#: What Python gives, and why it is refused.
CALLS = {
    "stop_tokens has 999999": lambda model: next(model.generate("x", stop_tokens=[999_999])),
    "stop_tokens is .-1.": lambda model: next(model.generate("x", stop_tokens=[-1])),
    "stop string .* is no Unicode": lambda model: next(model.generate("x", stop=["a", "\udcff"])),
    "token id 9223372036854775807": lambda model: next(model.generate(np.array([2**64 - 1], np.uint64))),
    "batch is 1.5": lambda model: model.new_state(1.5),
    "batch is '2'": lambda model: model.new_state("2"),
    "batch is True": lambda model: model.new_state(True),
    "more than the memory has room for": lambda model: model.new_state(10**12),
    "batch is 1180591620717411303424": lambda model: model.new_state(2**70),
    "the mask is <U1, expected numbers": lambda model: model.forward([[1]], model.new_state(), mask=[["0"]]),
    "graph is 'bogus', expected one of native": lambda model: dijiang.load(model.bundle.path, graph="bogus"),
    "threads is 0": lambda model: dijiang.verify(model.bundle.path, TINY, threads=0, store=False),
    "provider is None": lambda model: dijiang.verify(model.bundle.path, TINY, provider=None, store=False),
    "decay 'bogus' is unknown": lambda model: dijiang.export(TINY, "/none/x", decay="bogus"),
    "threads is 'x'": lambda model: dijiang.export(TINY, "/none/x", threads="x"),
    "dialect, its old name": lambda model: dijiang.export(TINY, "/none/x", graph="native", dialect="ort"),
    "calibration tokens -1": lambda model: dijiang.export(TINY, "/none/x", precision="int8", calibration_tokens=-1),
    "block size 64.0 is unknown": lambda model: dijiang.export(TINY, "/none/x", precision="int8", block_size=64.0),
}


@pytest.mark.parametrize("reason", CALLS)
def test_call_with_what_is_none_is_one_line(tiny, reason):
    model = dijiang.load(tiny)
    with pytest.raises(dijiang.DijiangError, match=reason) as refused:
        CALLS[reason](model)
    assert len(str(refused.value).splitlines()) == 1


def test_revision_of_one_of_two_models_is_used(cli, tiny, monkeypatch):
    asked = []

    def folder_of(given, revision):
        asked.append((given, revision))
        return TINY if given == "org/name" else type(TINY)(given)

    monkeypatch.setattr("dijiang.hub.folder_of", folder_of)
    done = cli("verify {b} --against org/name --revision v1 --tokens 8 --no-store --json")
    assert json.loads(done.stdout)["passed"]
    assert ("org/name", "v1") in asked
