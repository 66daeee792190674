"""A conversation, and the chat on it: turns taken back, branches, files, pipes."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main
from dijiang.runtime.dialogue import Dialogue
from dijiang.runtime.options import Generation, authors_choice

#: What prompt_toolkit ends a prompt with: lines wrap again.
READY = "\x1b[?7h"
OPTIONS = Generation(max_tokens=6, temperature=1.0, seed=4, ignore_eos=True)


@pytest.fixture(scope="module")
def model(chatty):
    return dijiang.load(chatty, threads=1)


@pytest.fixture
def cli(chatty):
    """cli(lines, *flags): dijiang chat in a pipe."""
    return lambda lines, *flags: CliRunner().invoke(
        main, ["chat", str(chatty), "-t", "1", *map(str, flags)], input="".join(f"{line}\n" for line in lines)
    )


def text(records):
    return "".join(record.text for record in records)


def talk(model, *said, options=OPTIONS):
    dialogue = Dialogue(model, options)
    return dialogue, [text(dialogue.say(one)) for one in said]


def test_turns_are_those_of_the_whole_text(model):
    dialogue, answers = talk(model, "one", "two")
    tokenizer, ids = model.tokenizer, []
    for said, end in (("one", ""), ("two", "<|endoftext|>\n")):
        given = f"{end}# user: {said}<|endoftext|>\n# assistant:"
        ids += tokenizer.encode(given, start=False) if end else tokenizer.as_it_stands(given)
        records = list(model.generate(ids, **vars(OPTIONS)))
        assert answers.pop(0) == text(records)
        ids += [record.token for record in records]
    assert int(dialogue.state.position[0]) == len(ids) - 1  # all but the pending token


def test_undo_gives_the_state_of_before(model):
    dialogue, _ = talk(model, "one", "two")
    assert dialogue.undo() == "two"
    twin, _ = talk(model, "one")
    assert [a.tobytes() for a in dialogue.state.layers] == [a.tobytes() for a in twin.state.layers]
    assert text(dialogue.say("three")) == text(twin.say("three"))
    for _ in range(2):
        dialogue.undo()
    with pytest.raises(dijiang.InputError, match="no turn to take back"):
        dialogue.undo()


def test_regenerate_draws_another_answer_from_the_same_state(model):
    dialogue, answers = talk(model, "one", "two")
    others = [text(dialogue.regenerate()) for _ in range(3)]
    assert len({answers[1], *others}) == 4
    assert dialogue.undo() == "two"
    assert text(dialogue.say("two")) == answers[1]


def test_fork_leaves_the_other_alone(model):
    dialogue, _ = talk(model, "one", "two")
    fork = dialogue.fork()
    fork.undo()
    text(fork.say("another way"))
    twin, _ = talk(model, "one", "two")
    assert text(dialogue.say("three")) == text(twin.say("three"))
    dialogue.undo()
    dialogue.undo()
    assert text(dialogue.say("two")) == talk(model, "one", "two")[1][1]
    assert text(dialogue.fork().regenerate()) == text(dialogue.regenerate())


def test_stopped_answer_stays_as_far_as_it_was_told(model):
    dialogue, _ = talk(model, "one")
    records = dialogue.say("two")
    told = [next(records).token for _ in range(3)]
    records.close()
    assert dialogue.state.seam().token == told[-1]
    assert text(dialogue.say("three"))


@pytest.mark.parametrize("again", [False, True])
def test_message_that_did_not_go_in_was_not_said(model, monkeypatch, again):
    """Ctrl-C while a long one is fed, in pieces."""
    dialogue, _ = talk(model, "one", "two " * 400)
    before, undone = [a.tobytes() for a in dialogue.state.layers], len(dialogue._before)
    run, left = type(model.session).run, [1]

    def interrupted(session, step, state):
        if not left.pop():
            raise KeyboardInterrupt
        left.append(0)
        return run(session, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.session), "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(dialogue.regenerate() if again else dialogue.say("three " * 400))
    assert ([a.tobytes() for a in dialogue.state.layers], len(dialogue._before)) == (before, undone)
    assert text(dialogue.say("four")) == text(talk(model, "one", "two " * 400)[0].say("four"))


def test_message_that_was_said_before_another_is_not_heard_after_it(model):
    dialogue, _ = talk(model, "one")
    first, second = dialogue.say("two"), dialogue.say("three")
    text(second)
    with pytest.raises(dijiang.InputError, match="the conversation went on since this was said"):
        text(first)
    assert dialogue.undo() == "three"


def test_regenerate_never_draws_the_answer_that_stands_there(model):
    dialogue, _ = talk(model, "one")
    second = text(dialogue.regenerate())
    assert text(dialogue.fork().regenerate()) != second
    text(dialogue.say("two"))
    dialogue.undo()
    assert text(dialogue.regenerate()) != second


def test_state_of_several_sequences_is_no_conversation(model, tmp_path):
    dialogue, _ = talk(model, "one")
    before, state = dialogue.state, model.new_state(2)
    model.forward([[1, 2]] * 2, state)
    state.save(tmp_path / "two")
    with pytest.raises(dijiang.InputError, match="a state of 2 sequences, expected 1"):
        dialogue.load(tmp_path / "two")
    assert dialogue.state is before


def test_saved_conversation_goes_on(model, tmp_path):
    dialogue, _ = talk(model, "one")
    dialogue.save(tmp_path / "s")
    other = Dialogue(model, OPTIONS)
    other.load(tmp_path / "s")
    assert text(other.say("two")) == text(dialogue.say("two"))
    foreign = dialogue.state
    dijiang.State(
        [a * 1 for a in foreign.layers], foreign.position, "f" * 64, foreign.vocab_size, last=foreign.last
    ).save(tmp_path / "f")
    before = other.state
    with pytest.raises(dijiang.InputError, match="the state is of checkpoint"):
        other.load(tmp_path / "f")
    assert other.state is before


def test_failed_turn_changes_nothing(model):
    dialogue, _ = talk(model, "one")
    position = dialogue.state.position.tolist()
    with pytest.raises(dijiang.InputError, match="is no Unicode"):
        dialogue.say("\ud800")
    assert (dialogue.state.position.tolist(), dialogue.undo()) == (position, "one")


# The command.


def test_chat_in_a_pipe_gives_answers_on_stdout(cli, model):
    flags = ["--max-tokens", 6, "--seed", 4, "--ignore-eos", "--temperature", 1, "--top-k", 0]
    done = cli(["one", "", "two"], *flags)
    assert (done.exit_code, done.stdout) == (0, "".join(f"{one}\n" for one in talk(model, "one", "two")[1]))
    assert done.stderr == ""


def test_authors_sampling_is_used_where_no_flag_is_given(cli, model):
    flags = ["--max-tokens", 6, "--seed", 4, "--ignore-eos"]
    drawn = Generation(max_tokens=6, temperature=1.0, top_k=50, seed=4, ignore_eos=True)
    assert cli(["one"], *flags).stdout == talk(model, "one", options=drawn)[1][0] + "\n"
    greedy = Generation(max_tokens=6, ignore_eos=True)
    assert cli(["one"], *flags, "--temperature", 0).stdout == talk(model, "one", options=greedy)[1][0] + "\n"


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 50}, {"temperature": 0.0}),
        ({"top_p": 0.5, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": True, "top_k": None}, {"temperature": 1.0}),
    ],
)
def test_authors_choice_is_as_transformers_reads_it(sampling, expected):
    assert authors_choice(sampling) == expected


@pytest.mark.parametrize("value", [-1, "hot", float("nan"), [1]])
def test_wrong_authors_choice_is_one_line(value):
    with pytest.raises(dijiang.InputError, match=r"^generation_config\.json: temperature is .+, and export again$"):
        authors_choice({"do_sample": True, "temperature": value})
    given = {"temperature": 0.5, "seed": 3}
    found = authors_choice({"do_sample": True, "temperature": value, "top_k": 4}, given)
    assert found == {"temperature": 0.5, "seed": 3, "top_k": 4}


def test_every_command_of_the_chat(cli, tmp_path):
    flags = ["--max-tokens", 5, "--seed", 1, "--ignore-eos", "--stop", "\n"]
    done = cli(
        [
            "a",
            f"/save {tmp_path / 's'}",
            "b",
            "/undo",
            "b",
            "/fork",
            "c",
            "/branch 1",
            "c",
            "/regenerate",
            "/stats",
        ],
        *flags,
    )
    _, b, again, c, same, other = done.stdout.splitlines()
    assert done.exit_code == 0
    assert (b, c) == (again, same)
    assert other != same
    assert "taken back: b" in done.stderr
    assert "MB at any length" in done.stderr
    loaded = cli([f"/load {tmp_path / 's'}", "b"], *flags)
    assert loaded.stdout == b + "\n"
    assert cli(["b"], *flags, "--load-state", tmp_path / "s").stdout == b + "\n"
    assert cli(["/help"]).stderr.count("[/") == 9
    assert cli(["a", "/system be kind", "a"], *flags).stdout.splitlines()[1] == (
        cli(["a"], *flags, "--system", "be kind").stdout.rstrip("\n")
    )


@pytest.mark.parametrize(
    "line", ["/nothing", "/undo", "/load", "/load /no/such/file", "/branch 7", "/save /no/such/file"]
)
def test_bad_command_is_one_line(cli, line):
    done = cli([line])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_model_without_a_template_is_refused(exported):
    done = CliRunner().invoke(main, ["chat", str(exported("tiny-python"))], input="x\n")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "has no chat template" in done.stderr


def test_ctrl_c_in_a_terminal_stops_the_answer_and_keeps_the_chat(chatty, tmp_path):
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "dijiang", "chat", str(chatty), "--max-tokens", "100000", "--ignore-eos"]
    environment = os.environ | {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    process = subprocess.Popen(
        program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = ""

    def until(words, seconds=20):
        nonlocal seen
        end = time.monotonic() + seconds
        while words not in seen and time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 1 << 16).decode(errors="replace")
        assert words in seen
        seen = seen.partition(words)[2]

    try:
        until(READY)
        os.write(ours, b"hello\r")
        while len(seen) < 4000:  # the line, and what is answered
            seen += os.read(ours, 1 << 16).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        until("[stopped]")
        until(READY)
        os.write(ours, b"/stats\r")
        until("at any length")
        until(READY)
        os.write(ours, b"\x04")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    history = tmp_path / "dijiang" / "chat_history"
    assert "hello" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0  # nobody else's
