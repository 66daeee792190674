"""The command line: every flag does something; bad input is one line and the right exit status."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import click
import prompt_toolkit
import pytest
from click.testing import CliRunner

import dijiang
from dijiang import files, hidden
from dijiang.cli import main
from dijiang.commands import chat, spoken
from dijiang.runtime import model
from tests.conftest import EXAMPLES, GOLDEN

TINY = EXAMPLES / "tiny-python"


@pytest.fixture
def cli():
    """cli(*arguments): the finished command, with stdout, stderr and exit_code."""
    return lambda *arguments, **options: CliRunner().invoke(main, [str(a) for a in arguments], **options)


@pytest.fixture
def tiny(exported):
    return exported("tiny-python")


def test_export_inspect_verify_run_end_to_end(cli, tmp_path):
    bundle = tmp_path / "bundle"
    assert cli("export", TINY, "-o", bundle, "--no-verify").exit_code == 0
    assert "not verified" in cli("inspect", bundle).stdout
    verified = cli("verify", bundle, "--against", TINY, "--tokens", 600, "--text", TINY / "held_out.txt")
    assert verified.exit_code == 0
    assert "passed" in verified.stdout
    assert "perplexity" in verified.stdout
    assert "passed" in cli("inspect", bundle).stdout
    ran = cli("run", bundle, "-p", "def main(", "-n", 8)
    assert ran.exit_code == 0
    assert "finish: limit" in ran.stderr
    assert "tokens/s" in ran.stderr


def test_json_of_every_command(cli, tmp_path):
    bundle = tmp_path / "bundle"
    written = json.loads(cli("export", TINY, "-o", bundle, "--no-verify", "--json").stdout)
    assert (written["format_version"], written["path"]) == (2, str(bundle))
    assert json.loads(cli("inspect", bundle, "--json").stdout) == written
    report = json.loads(cli("verify", bundle, "--against", TINY, "--tokens", 64, "--json").stdout)
    assert report["passed"]
    assert report["logits"]["max_error"] < 1e-4
    ran = json.loads(cli("run", bundle, "-p", "def", "-n", 3, "--json").stdout)
    assert (ran["generated"], ran["finish_reason"], ran["prompt_tokens"]) == (3, "limit", 1)
    assert isinstance(ran["text"], str)


def test_verify_exits_with_1_when_a_gate_fails_but_shows_the_figures(cli, tmp_path, edit_tensors):
    def change(tensors):
        tensors["gpt_neox.final_layer_norm.bias"] += 0.01

    other = edit_tensors("tiny-python", change)
    bundle = tmp_path / "bundle"
    dijiang.export(TINY, bundle, verify=False)
    done = cli("verify", bundle, "--against", other, "--tokens", 32)
    assert done.exit_code == 1
    assert "FAILED" in done.stdout
    assert "other files" in done.stdout
    assert done.stderr.startswith("Error: the bundle differs from its checkpoint: ")
    assert "error_over_float32" in done.stderr
    assert "not verified" in cli("inspect", bundle).stdout  # it is another checkpoint


def test_report_is_kept_in_the_bundle_only_if_it_can_and_may_be(cli, tmp_path):
    bundle = tmp_path / "bundle"
    dijiang.export(TINY, bundle, verify=False)
    verify = ["verify", bundle, "--against", TINY, "--tokens", 8]
    assert cli(*verify, "--no-store").exit_code == 0
    assert "not verified" in cli("inspect", bundle).stdout
    (bundle / "parity.json").mkdir()  # in the way of the file
    refused = cli(*verify)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "parity.json: cannot be written" in refused.stderr
    assert "passed" in refused.stdout  # what was measured is not lost


def test_read_only_bundle_still_gets_its_report_on_stdout(cli, tmp_path, monkeypatch):
    dijiang.export(TINY, tmp_path / "b", verify=False)

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "new_file", refuse)
    done = cli("verify", tmp_path / "b", "--against", TINY, "--tokens", 8, "--json")
    assert json.loads(done.stdout)["passed"]
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "Read-only file system" in done.stderr
    assert done.stderr.endswith("or verify with --no-store\n")
    assert cli("verify", tmp_path / "b", "--against", TINY, "--tokens", 8, "--no-store").exit_code == 0


def test_what_cannot_be_removed_of_a_replaced_bundle_is_said(cli, tmp_path, monkeypatch):
    export = ["export", GOLDEN["neox-base"], "-o", tmp_path / "b", "--no-verify", "--force"]
    assert cli(*export).exit_code == 0
    monkeypatch.setattr(hidden.shutil, "rmtree", lambda *_, **__: None)
    done = cli(*export)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "b is written, but what it replaced cannot be removed; remove " in done.stderr
    monkeypatch.undo()
    assert cli(*export).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_prompt_comes_from_standard_input_without_p(cli, tiny):
    assert cli("run", tiny, "-n", 5, input="def main(").stdout == (
        cli("run", tiny, "-n", 5, "-p", "def main(").stdout
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", 5, "--seed", 3],
        ["--repetition-penalty", 5],
        ["--stop", "e"],
        ["-n", 3],
    ],
    ids=lambda flags: flags[0],
)
def test_each_generation_flag_changes_the_text(cli, tiny, flags):
    plain = cli("run", tiny, "-p", "def main(", "-n", 60)
    changed = cli("run", tiny, "-p", "def main(", "-n", 60, *flags)
    assert changed.exit_code == 0
    assert changed.stdout != plain.stdout


@pytest.mark.parametrize("flags", [["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]], ids=lambda f: f[0])
def test_each_filter_brings_a_hot_draw_back_to_greedy(cli, tiny, flags):
    greedy = cli("run", tiny, "-p", "def main(", "-n", 12)
    hot = ["--temperature", 3, "--seed", 3]
    assert cli("run", tiny, "-p", "def main(", "-n", 12, *hot).stdout != greedy.stdout
    assert cli("run", tiny, "-p", "def main(", "-n", 12, *hot, *flags).stdout == greedy.stdout


def test_stop_token_and_ignore_eos_reach_the_generator(cli, tiny):
    tokens = [r.token for r in dijiang.load(tiny).generate("def main(", max_tokens=6)]
    found = json.loads(cli("run", tiny, "-p", "def main(", "-n", 6, "--stop-token", tokens[2], "--json").stdout)
    assert (found["generated"], found["finish_reason"]) == (tokens.index(tokens[2]) + 1, "stop")
    ends = dijiang.load(tiny).spec.eos_token_ids
    free = cli("run", tiny, "-p", "x", "-n", 400, "--temperature", 2, "--seed", 1, "--ignore-eos", "--json")
    assert json.loads(free.stdout)["generated"] == 400
    assert ends


BAD_INPUT = {
    "no checkpoint": (["export", "{tmp}/none", "-o", "{tmp}/b"], "not a folder"),
    "no bundle": (["inspect", "{tmp}"], "no dijiang.json, so not a bundle"),
    "run no bundle": (["run", "{tmp}", "-p", "x"], "run dijiang export first"),
    "no folder": (["export", "{tiny}", "-o", "/dev/null/b"], "cannot be written"),
    "empty prompt": (["run", "{bundle}", "-p", ""], "the prompt is empty"),
    "bad option": (["run", "{bundle}", "-p", "x", "--top-p", "7"], "top_p is 7.0, expected"),
    "bad text": (
        ["verify", "{bundle}", "--against", "{tiny}", "--text", "{tmp}/none"],
        "cannot be read",
    ),
    "bad against": (["verify", "{bundle}", "--against", "{tmp}"], "config.json: not found"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_on_stderr_and_exit_1(cli, tiny, tmp_path, case):
    arguments, message = BAD_INPUT[case]
    done = cli(*(a.format(tmp=tmp_path, tiny=TINY, bundle=tiny) for a in arguments))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["export", TINY], ["run"], ["run", "b", "-n", "x"], ["export", "--precision", "fp1"], ["no"]],
)
def test_wrong_usage_exits_with_2(cli, arguments):
    assert cli(*arguments).exit_code == 2


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands)])
def test_help_of_every_command(cli, command):
    done = cli(*command, "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.stdout


def test_installed_command_prints_no_traceback(tmp_path):
    program = Path(sys.executable).with_name("dijiang")
    done = subprocess.run([program, "inspect", tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert dijiang.__version__ in version.stdout


LONG = "n" * 300


@pytest.mark.parametrize(
    "command",
    [
        ("run", LONG, "-p", "x"),
        ("inspect", LONG),
        ("sign", LONG, "--key", "k"),
        ("build", LONG),
        ("serve", LONG),
        ("bench", LONG),
        ("verify", LONG, "--against", TINY),
        ("export", LONG, "-o", "new"),
        ("convert", LONG, "-o", "new"),
        ("export", TINY, "-o", "new", "--text", LONG),
        ("export", TINY, "-o", "circle/new"),
        ("inspect", "circle"),
        ("init", "pythia-70m", "-o", "circle/new"),
    ],
    ids=lambda command: f"{command[0]}-{len(command)}-{'circle' in str(command)}",
)
def test_a_name_that_no_file_can_have_is_one_line_that_names_it(cli, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    done = cli(*command)
    assert done.exit_code == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert (LONG if LONG in command else "circle") in errors[0]
    assert "Errno" not in errors[0] or "unreadable" in errors[0]


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_closed_stream_is_an_empty_one(tiny, stream):
    command = f"{sys.executable} -m dijiang run {tiny} -p def -n 2 {stream}>&-"
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
@pytest.mark.parametrize("command", ["inspect {}", "run {} -p def -n 2", "--help"])
def test_output_that_is_full_is_one_line(tiny, command):
    said = f"{sys.executable} -m dijiang {command.format(tiny)} > /dev/full"
    done = subprocess.run(said, shell=True, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Error: [Errno 28] No space left on device" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
@pytest.mark.parametrize(("options", "code"), [("-p def --ignore-eos", 0), ("-p def -n 0", 1)])
def test_remarks_that_nobody_can_read_end_nothing(tiny, options, code):
    said = f"{sys.executable} -m dijiang run {tiny} {options} --top-k 5 2> /dev/full"
    done = subprocess.run(said, shell=True, capture_output=True, text=True)
    assert (done.returncode, bool(done.stdout)) == (code, code == 0)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ImportError("a.so: failed to map segment from shared object"), RuntimeError("std::bad_alloc")],
)
def test_a_system_that_gives_no_more_memory_is_one_line(tiny, cli, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(model, "load", refuse)
    done = cli("run", tiny, "-p", "def")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: too little memory (")
    assert "raise ulimit -v" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_system_that_starts_no_more_threads_is_one_line(tiny, cli, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = cli("run", tiny, "-p", "def")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: the system starts no more threads; raise ulimit -u")
    assert done.stderr.count("\n") == 1


def test_chat_in_a_terminal_needs_no_place_for_its_history(tmp_path, monkeypatch):
    class Session:
        def __init__(self, history, completer):
            self.history = history

        def prompt(self, _):
            self.history.append_string("said")
            raise EOFError

    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(prompt_toolkit, "PromptSession", Session)
    for home in (tmp_path, tmp_path / "file"):
        monkeypatch.setattr(click, "get_app_dir", lambda name, home=home: str(home / name))
        assert [*chat._lines()] == []
    assert "said" in (tmp_path / "dijiang" / chat.HISTORY).read_text()


def test_names_in_utf8_are_found_in_any_locale(tiny, copy_of, tmp_path):
    copy_of(tiny).rename(tmp_path / "bündel ü")
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "dijiang", "run", "bündel ü", "-p", "def", "-n", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("provider", ["cpu", "auto"])
def test_name_that_is_no_unicode_is_one_line(tiny, copy_of, tmp_path, provider):
    folder = copy_of(tiny).rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    with pytest.raises(dijiang.SessionError, match="whose name is no UTF-8; rename it"):
        dijiang.load(folder, provider=provider)


def test_control_characters_of_a_model_do_not_command_a_terminal(monkeypatch):
    text = "a\x1b]52;c;eA==\x07\r\x9b1m\tb\n\u200d\u00e9"
    assert spoken(text) == text  # a pipe gets what the model said
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert spoken(text) == "a\\x1b]52;c;eA==\\x07\\r\\x9b1m\tb\n\u200d\u00e9"
