"""A conversation with one model: turns that can be taken back, and branches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .chat_template import ChatTemplate, Message, continued
from .generate import prepare, stream
from .model import Model
from .options import Generation
from .sequence import Record
from .snapshot import Snapshot
from .state import State
from .witness import resumed, take

#: Turns that can be taken back: each keeps a state, whose size does not depend on the conversation.
KEPT = 32


class Turn(NamedTuple):
    """The state before a message, what was said, and the attempt of the turn before."""

    state: State
    said: str
    attempt: int


class Dialogue:
    """Messages go in, records come out; only what is new is fed.

    Args:
        system: what the template's system message says; None: none.
    """

    def __init__(self, model: Model, options: Generation, system: str | None = None) -> None:
        self.model, self.system = model, system
        self._options = options.seeded()
        self._template = ChatTemplate.of(model.bundle)
        self.state = model.new_state()
        #: Their states are never advanced.
        self._before: deque[Turn] = deque(maxlen=KEPT)
        self._attempt = 0

    def say(self, text: str) -> Iterator[Record]:
        """The answer to a message; whoever stops listening keeps what was said so far.

        Where that is nothing, as the message did not go in, the conversation is as it was.

        Raises:
            InputError: the template refuses it, or it does not fit; the conversation is as it was.
        """
        return self._answer(Turn(self.state, text, self._attempt), 0)

    def undo(self) -> str:
        """Take the last turn back; what was said in it. InputError if there is none."""
        self._require_turn()
        self.state, said, self._attempt = self._before.pop()
        return said

    def regenerate(self) -> Iterator[Record]:
        """Another answer to the last message, drawn by other numbers; only that message is fed again.

        Raises:
            InputError: there is no turn.
        """
        self._require_turn()
        return self._answer(self._before[-1], self._attempt + 1)

    def _require_turn(self) -> None:
        if not self._before:
            raise InputError(f"there is no turn to take back; the last {KEPT} are kept")

    def _answer(self, turn: Turn, attempt: int) -> Iterator[Record]:
        """The records of a turn's answer; with the first of them the conversation stands after that turn."""
        ids, options = self._ids(turn), self._options.attempt(attempt)
        plan, state = prepare(self.model, ids, options, turn.state, keeps=False), turn.state.clone()
        return self._heard(turn, attempt, state, stream(self.model, plan, state))

    def _heard(self, turn: Turn, attempt: int, state: State, records: Iterator[Record]) -> Iterator[Record]:
        again = bool(self._before) and self._before[-1] is turn
        if not again and self.state is not turn.state:
            raise InputError("the conversation went on since this was said; say it again")
        first = next(records)
        if not again:
            self._before.append(turn)
        self.state, self._attempt = state, attempt
        yield first
        yield from records

    def _ids(self, turn: Turn) -> list[int]:
        """What is fed of a message: what ends the answer before it, and what the template puts around it."""
        message: Message = {"role": "user", "content": turn.said}
        model = self.model
        if turn.state.position[0]:
            return continued(self._template, model.tokenizer, turn.state, model.spec.eos_token_ids, [message])
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return model.tokenizer.as_it_stands(self._template.render([*system, message]))

    def restart(self, system: str | None) -> None:
        """Forget everything, and begin with this system message; None: without one."""
        self.system, self.state = system, self.model.new_state()
        self._before.clear()

    def fork(self) -> Dialogue:
        """A copy that goes its own way from here."""
        other = Dialogue(self.model, self._options, self.system)
        other.state = self.state.clone()
        other._before, other._attempt = self._before.copy(), self._attempt
        return other

    def save(self, path: Path) -> None:
        """Keep the conversation's state in a file; InputError if it cannot be written."""
        take(self.model, self.state, self._options).save(path)

    def load(self, path: Path) -> None:
        """Go on from a file; InputError if it is none of this checkpoint: the conversation is as it was."""
        state = resumed(self.model, Snapshot.load(path))
        if state.batch != 1:
            raise InputError(f"{path}: a state of {state.batch} sequences, expected 1; give that of a conversation")
        self.state = state
        self._before.clear()
