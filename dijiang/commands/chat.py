"""dijiang chat."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bundle.sizes import sizes
from ..errors import DijiangError, InputError
from ..runtime.options import Generation, Loading
from . import (
    BYTE_ORDER_MARK,
    FILE,
    given_options,
    model_folder,
    options_of,
    printable,
    refuse_given,
    say,
    say_idle,
    spoken,
    taken,
    tell,
)

if TYPE_CHECKING:
    from ..runtime.dialogue import Dialogue
    from ..runtime.sequence import Record

#: Tokens of an answer at most, where nobody says how many.
ANSWER = 2048
HISTORY = "chat_history"


@click.command()
@model_folder("bundle")
@click.option("--system", help="The system message.")
@click.option("--load-state", type=FILE, help="Go on from a saved conversation.")
@options_of(Generation, Loading)
def chat(bundle: Path, system: str | None, load_state: Path | None, **options: Any) -> None:
    """Talk with BUNDLE by its own chat template. Each line is a message; /help names the commands."""
    if load_state is not None:
        refuse_given(("system",), "beside --load-state")
    from ..runtime.dialogue import Dialogue
    from ..runtime.model import load
    from ..runtime.options import authors_choice

    model = load(bundle, say=say, **taken(Loading, options))
    chosen = {"max_tokens": ANSWER} | authors_choice(model.bundle.sampling, given_options(options))
    generation = Generation.of(options | chosen)
    say_idle(generation)
    dialogue = Dialogue(model, generation, system)
    if load_state is not None:
        dialogue.load(load_state)
    desk = Desk(dialogue)
    for line in _lines():
        try:
            desk.take(line)
        except DijiangError as error:
            if not sys.stdin.isatty():
                raise
            tell(f"Error: {printable(str(error))}")


class Desk:
    """Carries out lines: messages, and commands that begin with a slash."""

    def __init__(self, dialogue: Dialogue) -> None:
        self._branches, self._dialogue = [dialogue], dialogue
        self._last: Record | None = None

    def take(self, line: str) -> None:
        """One line; InputError for a command that is unknown or fails."""
        if not line.strip():
            return
        if not line.startswith("/"):
            self._answer(self._dialogue.say(line))
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            raise InputError(f"/{name} is unknown, expected one of {', '.join('/' + known for known in COMMANDS)}")
        COMMANDS[name](self, rest.strip())

    def help(self, _: str) -> None:
        """name the commands"""
        for name, command in COMMANDS.items():
            say(f"/{name}: {command.__doc__}")

    def save(self, file: str) -> None:
        """FILE: keep the conversation"""
        self._dialogue.save(Path(_needed(file, "/save FILE")))

    def load(self, file: str) -> None:
        """FILE: go on from a saved conversation"""
        self._dialogue.load(Path(_needed(file, "/load FILE")))

    def undo(self, _: str) -> None:
        """take the last message and its answer back"""
        say(f"taken back: {printable(self._dialogue.undo())}")

    def regenerate(self, _: str) -> None:
        """another answer to the last message"""
        self._answer(self._dialogue.regenerate())

    def fork(self, _: str) -> None:
        """go on in a copy; /branch leads back"""
        self._dialogue = self._dialogue.fork()
        self._branches.append(self._dialogue)
        say(f"branch {len(self._branches)}")

    def branch(self, number: str) -> None:
        """N: go on in the N-th branch"""
        if not number.isdecimal() or not 1 <= int(number) <= len(self._branches):
            raise InputError(f"there are branches 1 to {len(self._branches)}; give one of them")
        self._dialogue = self._branches[int(number) - 1]

    def system(self, text: str) -> None:
        """TEXT: begin anew with this system message"""
        self._dialogue.restart(text or None)

    def stats(self, _: str) -> None:
        """tokens, rates and the size of the state"""
        state, bundle = self._dialogue.state, self._dialogue.model.bundle
        tokens = int(state.position[0])
        say(
            f"{tokens} tokens; the state is {state.nbytes / 1e6:,.2f} MB at any length, a vanilla fp16 cache would "
            f"be {tokens * sizes(bundle).cache_bytes_per_token / 1e6:,.2f} MB"
        )
        if self._last is not None:
            last = self._last
            say(f"last answer: {last.generated} tokens, {last.decode_rate:,.0f} tokens/s, {last.finish_reason}")

    def _answer(self, records: Iterator[Record]) -> None:
        """Print an answer as it comes; Ctrl-C ends it, and what was said stays in the state."""
        try:
            for self._last in records:
                click.echo(spoken(self._last.text), nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            tell(" [stopped]", nl=False)
        finally:
            getattr(records, "close", lambda: None)()
            click.echo()


#: Names of commands -> what they do; their docstrings are their help.
COMMANDS: dict[str, Callable[[Desk, str], None]] = {
    name: getattr(Desk, name)
    for name in ("help", "save", "load", "undo", "regenerate", "fork", "branch", "system", "stats")
}


def _needed(argument: str, usage: str) -> str:
    if not argument:
        raise InputError(f"the name of a file is missing; say {usage}")
    return argument


def _lines() -> Iterator[str]:
    """Lines of a terminal, edited and remembered, or of a pipe."""
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin):
            yield line.rstrip("\r\n") if number else line.rstrip("\r\n").removeprefix(BYTE_ORDER_MARK)
        return
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    except ImportError:
        raise InputError("a chat in a terminal needs prompt_toolkit; pip install 'dijiang[chat]'") from None
    file = Path(click.get_app_dir("dijiang"), HISTORY)
    history: History = InMemoryHistory()
    with suppress(OSError):  # where nothing can be kept, lines are remembered until the end
        file.parent.mkdir(0o700, parents=True, exist_ok=True)
        file.touch(0o600)
        history = FileHistory(str(file))
    session: PromptSession[str] = PromptSession(
        history=history, completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    )
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
