"""Calls of tools: how a checkpoint writes them, learnt from its own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import InputError
from .chat_template import ChatTemplate, Message
from .grammar import COMPACT, require_small, without_remarks
from .text import TextTokenizer

#: Stand for calls when a template is asked how it writes them. Some templates want an id of nine characters.
NAMES, ARGUMENTS, ID = ("first_stand_in", "second_stand_in"), {"left_stand_in": 1, "right_stand_in": 2}, "idstandin"
#: How JSON is spaced: between items, after keys.
SPACINGS = ((", ", ": "), (",", ":"))


class Tool(NamedTuple):
    """A function that may be called: its name, the JSON schema of its arguments, and what it does."""

    name: str
    parameters: dict[str, Any]
    description: str = ""


@dataclass(frozen=True)
class Syntax:
    """opening NAME between ARGUMENTS (joint NAME between ARGUMENTS)* closing

    joint: None: the template writes one call at most.  spacing: of the JSON, one of `SPACINGS`.
    """

    opening: str
    between: str
    joint: str | None
    closing: str
    spacing: tuple[str, str]

    @classmethod
    def learn(cls, template: ChatTemplate, tokenizer: TextTokenizer, ends: Collection[int]) -> Syntax:
        """Have a template write calls that are known.

        ends: end tokens of the model; the first of them that is written ends the last call.

        Raises:
            InputError: the template knows no tools, or writes calls otherwise than above, or with special tokens.
        """
        tools = [described(Tool(name, {"type": "object", "properties": {}})) for name in NAMES]
        asked: list[Message] = [{"role": "user", "content": "x"}]
        before = template.render(asked, tools=tools)
        if before == template.render(asked):
            raise InputError("the chat template knows no tools; leave tools out, or add them to the template")
        try:
            text = template.render([*asked, _answer(2)], answer=False, tools=tools)
        except InputError:  # some templates refuse two calls
            text = template.render([*asked, _answer(1)], answer=False, tools=tools)
        found = cls._read(text.removeprefix(before) if text.startswith(before) else "", tokenizer, ends)
        if found is None or ID in text:
            raise InputError(
                "the chat template does not write a call of a tool as text around its name and its JSON; leave "
                "tools out"
            )
        written = "".join((found.opening, found.between, found.joint or "", found.closing))
        if special := [name for name in map(tokenizer.name, tokenizer.special) if name in written]:
            raise InputError(f"the chat template writes calls with the special token {special[0]}; leave tools out")
        return found

    @classmethod
    def _read(cls, answer: str, tokenizer: TextTokenizer, ends: Collection[int]) -> Syntax | None:
        """From the text of an answer; None if it is not of this form."""
        one, two = NAMES
        for spacing in SPACINGS:
            given = re.escape(json.dumps(ARGUMENTS, separators=spacing))
            form = rf"(.+?){one}(.+?){given}(?:(.+?){two}(.+?){given})?(.*)"
            match = re.fullmatch(form, answer, re.DOTALL)
            if match is None:
                continue
            opening, between, joint, again, closing = match.groups()
            if again not in (None, between):
                return None
            named = [name for name in map(tokenizer.name, ends) if name]
            closing = min((closing.partition(name)[0] for name in named), key=len, default=closing)
            return cls(opening, between, joint, closing, spacing)
        return None

    def grammar(
        self, tools: Sequence[Tool], *, must: bool, several: bool, schema: dict[str, Any] | None = None
    ) -> str:
        """What an answer may look like, in llguidance's dialect of Lark.

        must: it is a call; else it may also be text, or text and then a call.  several: calls may follow another.
        schema: of JSON that is the answer where nothing is called; None: it is text.

        Raises:
            InputError: a call begins as JSON does, so that an answer in JSON could not be told from it; or the
                schemas take too long to compile.
        """
        require_small(*map(without_remarks, (schema, *(tool.parameters for tool in tools))))
        if must:
            schema = None
        elif schema is not None and self.opening.lstrip()[:1] in ("{", "[", '"'):
            raise InputError(
                "the chat template begins a call as JSON begins, so an answer in JSON would look like one; give "
                "tools or response_format"
            )
        joint, opening = self.joint if several else None, json.dumps(self.opening)
        said = (
            "TEXT" if schema is None else f"%json {json.dumps(without_remarks(schema) | {'x-guidance': COMPACT})}"
        )
        spaced = {"whitespace_flexible": False, "item_separator": self.spacing[0], "key_separator": self.spacing[1]}
        more = "" if joint is None else f"({json.dumps(joint)} call)*"
        end = json.dumps(self.closing) if self.closing else ""
        rules = [
            "%llguidance {}",
            f"start: {'' if must else 'said |'} opening call {more} {end}",
            f"opening: {opening}" if must or schema is not None else f"opening[lazy]: TEXT {opening}",
            f"said: {said}",
            r"TEXT: /(.|\n)*/",
            "call: " + " | ".join(f"call_{at}" for at in range(len(tools))),
        ]
        for at, tool in enumerate(tools):
            rules.append(f"call_{at}: {json.dumps(tool.name + self.between)} arguments_{at}")
            arguments = without_remarks(tool.parameters) | {"x-guidance": spaced}
            rules.append(f"arguments_{at}: %json {json.dumps(arguments)}")
        return "\n".join(rules)

    def reader(self, *, alone: bool = False) -> Reader:
        """For the text of one answer; alone: calls follow no text."""
        return Reader(self, alone=alone)


def described(tool: Tool) -> dict[str, Any]:
    """A tool as templates get it."""
    names = ("name", "description", "parameters")  # the order in which templates write them
    return {"type": "function", "function": {name: getattr(tool, name) for name in names}}


def _answer(calls: int) -> Message:
    made = [{"id": ID, "type": "function", "function": {"name": name, "arguments": ARGUMENTS}} for name in NAMES]
    return {"role": "assistant", "content": "", "tool_calls": made[:calls]}


class Part(NamedTuple):
    """A piece of what an answer is: text that is said, or of the call of a number, from 0.

    name: with the first piece of a call.  text: said, or of its arguments.
    """

    text: str
    call: int | None = None
    name: str | None = None


class Reader:
    """Takes the text of an answer in pieces and gives its parts as soon as they are certain.

    alone: an answer that does not begin with a call has none, whatever it says.
    """

    def __init__(self, syntax: Syntax, *, alone: bool = False) -> None:
        self._syntax, self._buffer, self._call = syntax, "", -1
        self._depth, self._quoted, self._escaped = 0, False, False
        self._parts: Callable[[], Iterator[Part]] = self._first if alone else self._said

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._call + 1

    @property
    def whole(self) -> bool:
        """Whether there are calls, and the last one has ended: a stop string may cut it."""
        return self._parts == self._between

    def push(self, text: str, *, last: bool = False) -> list[Part]:
        """What a piece of text adds. last: nothing follows, so that nothing is held back."""
        self._buffer += text
        found: list[Part] = []
        while True:
            before = self._parts
            found += before()
            if self._parts == before:
                break
        if last and self._parts in (self._first, self._said) and self._buffer:
            found.append(Part(self._buffer))
        return found

    def _first(self) -> Iterator[Part]:
        """The opening of a call; else all is said."""
        opening = self._syntax.opening
        if not opening.startswith(self._buffer[: len(opening)]):
            self._parts = self._only_said
        elif len(self._buffer) >= len(opening):
            self._buffer, self._parts = self._buffer.removeprefix(opening), self._name
        yield from ()

    def _only_said(self) -> Iterator[Part]:
        if self._buffer:
            yield Part(self._buffer)
            self._buffer = ""

    def _said(self) -> Iterator[Part]:
        opening = self._syntax.opening
        said, met, rest = self._buffer.partition(opening)
        if not met:
            held = next(n for n in range(len(opening), -1, -1) if said.endswith(opening[:n]))
            said, rest = said[: len(said) - held], said[len(said) - held :]
        else:
            self._parts = self._name
        self._buffer = rest
        if said:
            yield Part(said)

    def _name(self) -> Iterator[Part]:
        name, met, rest = self._buffer.partition(self._syntax.between)
        if met:
            self._buffer, self._parts, self._call = rest, self._arguments, self._call + 1
            yield Part("", self._call, name)

    def _arguments(self) -> Iterator[Part]:
        """An object as it comes, up to the bracket that ends it."""
        for at, character in enumerate(self._buffer):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
                continue
            self._quoted = character == '"'
            self._depth += (character in "{[") - (character in "}]")
            if not self._depth:
                yield Part(self._buffer[: at + 1], self._call)
                self._buffer, self._parts = self._buffer[at + 1 :], self._between
                return
        if self._buffer:
            yield Part(self._buffer, self._call)
            self._buffer = ""

    def _between(self) -> Iterator[Part]:
        """After a call: another one, or the end, which nobody is told of."""
        if self._syntax.joint is not None and self._buffer.startswith(self._syntax.joint):
            self._buffer, self._parts = self._buffer.removeprefix(self._syntax.joint), self._name
        yield from ()
