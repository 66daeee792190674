"""Many prompts from a file: in order, what each would be alone, and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import dijiang
from dijiang.batching.jobs import answer_file
from dijiang.cli import main
from dijiang.hidden import lock
from dijiang.runtime.options import Generation
from dijiang.runtime.sessions.cpu import CpuSession

PROMPTS = [
    {"prompt": "def main("},
    {"prompt": [5, 6, 7], "max_tokens": 3},
    {"prompt": "class A:\n", "temperature": 1.2, "seed": 3},
    {"prompt": "x" * 200, "max_tokens": 1},
] * 4


@pytest.fixture
def cli(chatty):
    return lambda *arguments: CliRunner().invoke(
        main, ["run", str(chatty), "-t", "1", "--max-tokens", "9", *map(str, arguments)]
    )


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n\n")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_in_order_and_what_each_is_alone(cli, chatty, source, tmp_path):
    done = cli("--jsonl", source, "-o", tmp_path / "out")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    model = dijiang.load(chatty)
    for index, (found, asked) in enumerate(zip(lines(tmp_path / "out"), PROMPTS, strict=True)):
        records = list(model.generate(**{"max_tokens": 9} | asked))
        assert found["index"] == index
        assert found["text"] == "".join(record.text for record in records)
        assert (found["generated"], found["finish_reason"]) == (len(records), records[-1].finish_reason)


@pytest.mark.parametrize("cut", [1, 150, -1])
def test_cut_output_is_gone_on_with(cli, source, tmp_path, cut):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli("--jsonl", source, "-o", whole).exit_code == 0
    out.write_bytes(whole.read_bytes()[: cut or None])
    assert cli("--jsonl", source, "-o", out).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_killed_job_is_gone_on_with(cli, chatty, tmp_path):
    source, whole, out = tmp_path / "in", tmp_path / "whole", tmp_path / "out"
    source.write_text("".join(json.dumps({"prompt": [n + 3], "ignore_eos": True}) + "\n" for n in range(80)))
    program = [
        sys.executable,
        "-m",
        "dijiang",
        "run",
        chatty,
        "--jsonl",
        source,
        "-o",
        out,
        "-t",
        "1",
        "--max-tokens",
        "9",
    ]
    process = subprocess.Popen(program)
    while not out.exists() or out.read_bytes().count(b"\n") < 10:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= out.read_bytes().count(b"\n") < 80
    assert cli("--jsonl", source, "-o", out).exit_code == 0
    assert cli("--jsonl", source, "-o", whole).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_what_prompts_share_is_fed_once(cli, chatty, tmp_path, monkeypatch):
    source, fed, run = tmp_path / "in", [], CpuSession.run
    source.write_text("".join(json.dumps({"prompt": [7] * 300 + [n]}) + "\n" for n in range(6)))

    def count(self, step, state):
        fed.append(step.ids.shape[1] if step.ids.shape[1] > 1 else 0)
        return run(self, step, state)

    monkeypatch.setattr(CpuSession, "run", count)
    assert cli("--jsonl", source, "-o", tmp_path / "out", "--max-tokens", 2).exit_code == 0
    assert sum(fed) < 6 * 301 / 2  # those that begin at once feed some of it, too
    monkeypatch.undo()
    model = dijiang.load(chatty, threads=1)
    for n, line in enumerate(lines(tmp_path / "out")):
        assert line["text"] == "".join(r.text for r in model.generate([7] * 300 + [n], max_tokens=2))


BAD = ["{", "[]", "{}", '{"prompt": 3}', '{"prompt": ""}', '{"prompt": "x", "nothing": 1}', '{"prompt": [99999]}']


def test_bad_line_has_its_error_and_others_their_answer(cli, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text("\n".join([*BAD, '{"prompt": "x"}']))
    done = cli("--jsonl", source, "-o", out)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "7 prompts failed" in done.stderr
    found = lines(out)
    assert all("error" in line for line in found[:-1])
    assert found[-1]["generated"] == 9
    again = cli("--jsonl", source, "-o", out)
    assert "7 prompts failed" in again.stderr


def test_output_of_other_prompts_is_refused_and_untouched(cli, source, tmp_path):
    out = tmp_path / "out"
    out.write_text('{"index": 0, "input": "other"}\n')
    before = out.read_bytes()
    done = cli("--jsonl", source, "-o", out)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "line 1 answers something else" in done.stderr
    assert out.read_bytes() == before
    (tmp_path / "link").symlink_to(out)
    assert cli("--jsonl", source, "-o", tmp_path / "link").exit_code == 1
    assert cli("--jsonl", tmp_path / "none", "-o", tmp_path / "new").exit_code == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changed", [["--temperature", 1.5], ["--max-tokens", 3], ["--bundle"]])
def test_answers_of_another_bundle_or_other_options_are_not_gone_on_with(cli, source, tmp_path, exported, changed):
    """Half of a file by one model and half by another would be told by nobody."""
    out = tmp_path / "out"
    assert cli("--jsonl", source, "-o", out, "--max-tokens", 2).exit_code == 0
    before = out.read_bytes()
    cut = before[: before.index(b"\n") + 20]
    for kept in (before, cut):
        out.write_bytes(kept)
        if changed == ["--bundle"]:
            command = ["run", exported("tiny-python"), "--jsonl", source, "-o", out, "--max-tokens", 2]
            done = CliRunner().invoke(main, list(map(str, command)))
        else:
            done = cli("--jsonl", source, "-o", out, "--max-tokens", 2, *changed)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert "line 1 was answered by another bundle or with other options" in done.stderr
        assert out.read_bytes() == kept
    assert cli("--jsonl", source, "-o", out, "--max-tokens", 2).exit_code == 0
    assert [line["text"] for line in lines(out)] == [json.loads(line)["text"] for line in before.splitlines()]


@pytest.mark.parametrize("other", ['{"years": "of work"}', '{"index": 1', '{"index": 0, "input": "0"'])
def test_file_without_a_line_end_is_no_answer_that_was_cut(cli, source, tmp_path, other):
    out = tmp_path / "out"
    out.write_text(other)
    done = cli("--jsonl", source, "-o", out)
    assert (done.exit_code, done.stderr.count("\n"), out.read_text()) == (1, 1, other)
    assert "line 1 answers something else" in done.stderr


def test_prompts_are_never_written_over(cli, source):
    source.write_text(before := source.read_text().rstrip().splitlines()[0])
    done = cli("--jsonl", source, "-o", source)
    assert (done.exit_code, done.stderr.count("\n"), source.read_text()) == (1, 1, before)


def test_rest_after_the_last_answer_is_refused(cli, source, tmp_path):
    out = tmp_path / "out"
    assert cli("--jsonl", source, "-o", out).exit_code == 0
    whole = out.read_bytes()
    out.write_bytes(whole + b"{")
    assert "line 17 answers something else" in cli("--jsonl", source, "-o", out).stderr
    assert out.read_bytes() == whole + b"{"


def test_second_job_on_one_output_is_refused(cli, source, tmp_path):
    out = tmp_path / "out"
    with out.open("w") as other:
        assert lock(other.fileno(), wait=False)
        done = cli("--jsonl", source, "-o", out)
        assert (done.exit_code, done.stderr.count("\n"), out.read_text()) == (1, 1, "")
        assert "another job writes it" in done.stderr
    assert cli("--jsonl", source, "-o", out).exit_code == 0


@pytest.mark.parametrize("flags", [["--jsonl", "x"], ["-o", "x"], ["--jsonl", "x", "-o", "y", "-p", "z"]])
def test_flags_that_do_not_go_together(cli, flags):
    assert cli(*flags).exit_code == 2


def test_answers_are_on_the_disk_when_the_job_ends(exported, tmp_path, monkeypatch):
    (tmp_path / "in").write_text('{"prompt": [1, 2]}\n' * 2)
    synced, fsync = [], os.fsync

    def noted(file):
        found = os.fstat(file)
        synced.append((found.st_ino, found.st_size))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    model = dijiang.load(exported("neox-base"))
    assert answer_file(model, tmp_path / "in", tmp_path / "out", Generation(max_tokens=2)) == 0
    found = (tmp_path / "out").stat()
    assert (found.st_ino, found.st_size) in synced


def test_zeros_that_a_loss_of_power_left_are_cut(cli, source, tmp_path):
    out = tmp_path / "out"
    assert cli("--jsonl", source, "-o", out).exit_code == 0
    whole = out.read_bytes()
    first = whole[: whole.index(b"\n") + 1]
    second = whole[len(first) : len(first) + 30]
    for torn in (first + b"\0" * 500, first + second + b"\0" * 4096, first[:40] + b"\0" * 9):
        out.write_bytes(torn)
        assert cli("--jsonl", source, "-o", out).exit_code == 0
        assert out.read_bytes() == whole
    out.write_bytes(b"\0" * 500)  # nothing says that it is ours
    assert "line 1 answers something else" in cli("--jsonl", source, "-o", out).stderr
    assert out.read_bytes() == b"\0" * 500


def test_full_disk_is_said_to_be_gone_on_from(cli, source, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    done = cli("--jsonl", source, "-o", tmp_path / "out")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.endswith("free some space and run it again: it goes on\n")
