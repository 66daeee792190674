"""A conversation with one model: turns that can be taken back, and branches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from .chat_template import ChatTemplate, Message, continued
from .generate import prepare, stream
from .model import Model
from .options import Generation
from .sequence import Record
from .snapshot import Snapshot
from .state import State
from .witness import take

#: Turns that can be taken back: each keeps a state, whose size does not depend on the conversation.
KEPT = 32


#: A state, the turns before it, and the attempt of the last one.
Place = tuple[State, "deque[tuple[State, str, int]]", int]


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
        #: The state before each turn, what was said, and the attempt of the turn before.
        self._before: deque[tuple[State, str, int]] = deque(maxlen=KEPT)
        self._attempt = 0

    def say(self, text: str) -> Iterator[Record]:
        """The answer to a message; whoever stops listening keeps what was said so far.

        Where that is nothing, as the message did not go in, the conversation is as it was.

        Raises:
            InputError: the template refuses it, or it does not fit; the conversation is as it was.
        """
        return self._turn(text, 0, self._place())

    def undo(self) -> str:
        """Take the last turn back; what was said in it. InputError if there is none."""
        if not self._before:
            raise InputError(f"there is no turn to take back; the last {KEPT} are kept")
        state, text, self._attempt = self._before.pop()
        self.state = state.clone()  # a fork may have the same one
        return text

    def regenerate(self) -> Iterator[Record]:
        """Another answer to the last message, drawn by other numbers; only that message is fed again.

        Raises:
            InputError: there is no turn.
        """
        place, attempt = self._place(), self._attempt + 1
        return self._turn(self.undo(), attempt, place)

    def _turn(self, text: str, attempt: int, place: Place) -> Iterator[Record]:
        options = self._options.attempt(attempt)
        plan = prepare(self.model, self._ids(text), options, self.state, keeps=False)
        records = stream(self.model, plan, self.state)
        self._before.append((self.state.clone(), text, self._attempt))
        self._attempt = attempt
        return self._heard(records, place)

    def _heard(self, records: Iterator[Record], place: Place) -> Iterator[Record]:
        """The same; where the message does not go in, the conversation is at a place of before again."""
        try:
            first = next(records)
        except BaseException:
            self.state, self._before, self._attempt = place
            raise
        yield first
        yield from records

    def _place(self) -> Place:
        """What a message changes, as it is now."""
        return self.state.clone(), self._before.copy(), self._attempt

    def _ids(self, text: str) -> list[int]:
        """What is fed of a message: what ends the answer before it, and what the template puts around it."""
        message: Message = {"role": "user", "content": text}
        model = self.model
        if self.state.position[0]:
            return continued(self._template, model.tokenizer, self.state, model.spec.eos_token_ids, [message])
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
        state = State.of(Snapshot.load(path))
        state.check(self.model.spec, self.model.manifest.fingerprint)
        if state.batch != 1:
            raise InputError(f"{path}: a state of {state.batch} sequences, expected 1; give that of a conversation")
        self.state = state
        self._before.clear()
