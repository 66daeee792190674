"""Answers in the shape of OpenAI's API, whole or in pieces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..runtime.calls import Part, Reader, Syntax
from ..runtime.sequence import Record
from ..runtime.text import TextTokenizer
from .echo import Echo
from .relay import Told
from .tools import Calls
from .wanted import Wanted

#: Why a text ends -> what OpenAI's API calls it.
REASONS = {"stop": "stop", "length": "length", "limit": "length", None: None}


def encoded(value: Any) -> bytes:
    """JSON in ASCII: what is no Unicode, too, is written as an escape."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def readable(piece: bytes) -> str:
    """The text of a token; as OpenAI's API writes bytes that are no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _begun(piece: Sequence[int]) -> int:
    """Characters that begin in some bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)


@dataclass
class Choice:
    """What was told of one choice so far.

    reader: of the calls of tools in its text; None: there are none.
    keeps: whether the whole answer is told at its end: text, logprobs and tokens. A stream has told them.
    begun: characters that begin in the tokens so far.
    """

    keeps: bool
    reader: Reader | None = None
    calls: Calls = field(default_factory=Calls)
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    generated: int = 0
    begun: int = 0
    reason: str | None = None

    def take(self, record: Record) -> dict[str, Any]:
        """Note a token; what a stream of a chat tells of it."""
        ended = record.finish_reason is not None
        parts = [Part(record.text)] if self.reader is None else self.reader.push(record.text, last=ended)
        said = "".join(part.text for part in parts if part.call is None)
        deltas = self.calls.deltas(parts)
        self.generated += 1
        if self.keeps:
            self.text.append(said)
            self.tokens.append(record.token)
        self.reason = REASONS[record.finish_reason]
        if self.reader is not None and self.reader.whole and record.finish_reason == "stop":
            self.reason = "tool_calls"
        return ({"content": said} if said or not deltas else {}) | ({"tool_calls": deltas} if deltas else {})

    @property
    def message(self) -> dict[str, Any]:
        """All of it, as a chat tells it."""
        text, calls = "".join(self.text), self.calls.all
        said = {"content": text or None, "tool_calls": calls} if calls else {"content": text}
        return {"role": "assistant"} | said


class Answer:
    """Takes in what is told, and gives the answer of `/v1/completions` or `/v1/chat/completions`.

    prompt_tokens: of all prompts.  cached: tokens of the state that was continued.
    syntax: of calls of tools, where they are offered.  echoes: one a prompt, where they are asked for.
    """

    def __init__(
        self,
        wanted: Wanted,
        tokenizer: TextTokenizer | None,
        *,
        prompt_tokens: int,
        cached: int = 0,
        syntax: Syntax | None = None,
        echoes: Sequence[Echo] = (),
    ) -> None:
        self._wanted, self._tokenizer, self._echoes = wanted, tokenizer, echoes
        self._chat = bool(wanted.messages)
        self._prompt_tokens, self._cached = prompt_tokens, cached
        self._created = int(time.time())
        alone = wanted.schema is not None
        readers = [None if syntax is None else syntax.reader(alone=alone) for _ in range(wanted.choices)]
        self._choices = [Choice(not wanted.stream, reader) for reader in readers]
        self.id = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(16)}"
        self._extra: dict[str, Any] = {}

    @property
    def generated(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.generated for choice in self._choices)

    def extend(self, **extra: Any) -> None:
        """Fields of ours for the end of the answer."""
        self._extra |= extra

    def spared(self, tokens: int) -> None:
        """Tokens of the prompts that were not fed, for others had begun alike."""
        self._cached += tokens

    def take(self, told: Told) -> dict[str, Any]:
        """Note a token; the piece of a stream that tells of it."""
        choice, record = self._choices[told.choice], told.record
        if self._wanted.silent:
            choice.reason = "length"
            return {}
        delta = choice.take(record)
        logprobs = None
        if told.nats is not None:
            own, *best = (self._named(*one) for one in told.nats)
            entry = own | {"top_logprobs": best}
            if choice.keeps:
                choice.logprobs.append(entry)
            logprobs = self._shaped([entry], choice.begun)
            choice.begun += _begun(entry["bytes"])
        piece: dict[str, Any] = {"index": told.choice, "logprobs": logprobs, "finish_reason": choice.reason}
        piece |= {"delta": delta} if self._chat else {"text": record.text}
        usage = {"usage": self.usage} if self._wanted.usage_each else {}
        return self._piece([piece | self._ids([record.token])]) | usage

    def opening(self) -> list[dict[str, Any]]:
        """Pieces before the first token: in a chat, who speaks."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._piece([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(len(self._choices))
        ]

    def closing(self) -> list[dict[str, Any]]:
        """Pieces after the last token: what it cost, and fields of ours."""
        if not self._wanted.usage and not self._extra:
            return []
        usage = {"usage": self.usage} if self._wanted.usage else {}
        return [self._piece([]) | usage | self._extra]

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens that it took."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self._prompt_tokens + self.generated,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def whole(self) -> dict[str, Any]:
        """The answer to who did not ask for a stream."""
        choices = []
        for index, choice in enumerate(self._choices):
            said: dict[str, Any] = {"index": index, "finish_reason": choice.reason}
            said["logprobs"] = self._shaped(choice.logprobs) if self._wanted.logprobs is not None else None
            said |= {"message": choice.message} if self._chat else {"text": "".join(choice.text)}
            said |= self._ids(choice.tokens)
            choices.append(self._echoed(self._echoes[index // self._wanted.n], said) if self._echoes else said)
        kind = "chat.completion" if self._chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self.usage} | self._extra

    def _echoed(self, echo: Echo, said: dict[str, Any]) -> dict[str, Any]:
        """A choice of a completion with its prompt before it."""
        logprobs = said["logprobs"]
        if logprobs is not None:
            logprobs = echo.logprobs(lambda token: readable(self._bytes(token)), logprobs)
        ids = self._ids(echo.ids + said.get("token_ids", []))
        return said | {"text": echo.text + said["text"], "logprobs": logprobs} | ids

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._wanted.model}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head(kind) | {"choices": choices}

    def _ids(self, tokens: list[int]) -> dict[str, Any]:
        """Ids where there is no tokenizer to make text of them."""
        return {} if self._tokenizer is not None else {"token_ids": tokens}

    def _bytes(self, token: int) -> bytes:
        return str(token).encode() if self._tokenizer is None else self._tokenizer.piece(token)

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._bytes(token)
        return {"token": readable(piece), "logprob": logprob, "bytes": list(piece)}

    def _shaped(self, entries: list[dict[str, Any]], start: int = 0) -> dict[str, Any]:
        """Log-probabilities as the API of chats, or the older one of completions, writes them.

        start: characters of the text before.
        """
        if self._chat:
            return {"content": entries}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [  # with the token itself, as OpenAI's API has it
                {one["token"]: one["logprob"] for one in (*entry["top_logprobs"], entry)} for entry in entries
            ],
            "text_offset": np.cumsum([start, *(_begun(entry["bytes"]) for entry in entries)])[:-1].tolist(),
        }
