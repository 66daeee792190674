"""One sequence being generated: fed with tokens, it gives records."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from .sampling import Sampler, most_likely
from .sessions.base import Output
from .snapshot import Seam
from .text import StopStrings, TextStream

FinishReason = Literal["stop", "length", "limit"]


@dataclass(frozen=True)
class Record:
    """One generated token.

    text: what it adds to the text; may be empty while a character or a stop string is incomplete.
    token: its id.
    finish_reason: None while there is more to come; `stop` (an end token or stop string), `length`
        (the model has no further positions; `detail` says why) or `limit` (max_tokens reached).
    prompt_tokens, generated: counts so far.
    prefill_rate, decode_rate: tokens a second of the prompt and of the decode steps so far.
    """

    text: str
    token: int
    finish_reason: FinishReason | None
    detail: str | None
    prompt_tokens: int
    generated: int
    prefill_rate: float
    decode_rate: float


@dataclass(frozen=True)
class Limits:
    """Where a sequence ends.

    tokens: generated at most.  positions: of the model, None: no end; reason: why they end.
    ends: token ids that end it.  keeps: the caller goes on from its state, so that what is held back at
    the limit of tokens stays there.
    """

    tokens: int
    positions: int | None = None
    reason: str | None = None
    ends: frozenset[int] = frozenset()
    keeps: bool = False


class Sequence:
    """Chooses tokens from outputs and turns them into records; knows nothing of models and sessions.

    Args:
        sampler: None takes the most likely token, which is picked in the graph: on a GPU logits are
            expensive to copy, on a CPU they are in another core's cache.
        text: of the tokens, None: there is no tokenizer.
        prompt_tokens: for the records.
        started: when the prompt went in, by `time.perf_counter`.
    """

    def __init__(
        self,
        limits: Limits,
        stops: StopStrings,
        sampler: Sampler | None,
        text: TextStream | None,
        *,
        prompt_tokens: int,
        started: float,
    ) -> None:
        self._limits, self._stops, self._sampler, self._text = limits, stops, sampler, text
        self._prompt_tokens, self._started = prompt_tokens, started
        self._generated, self._ready = 0, started

    def choose(self, output: Output, position: int, row: int = 0) -> int:
        """The token of a position from an output of one kept token a sequence."""
        if self._sampler is None:
            return most_likely(output, row, 0, position)
        return self._sampler(output.logits[row, 0], position)

    def push(self, token: int, position: int) -> Record:
        """The record of a chosen token; `position` is where it will be fed."""
        now = time.perf_counter()
        self._ready = self._ready if self._generated else now
        self._generated += 1
        limits, is_end = self._limits, token in self._limits.ends
        added = "" if self._text is None or is_end else self._text.push(token)
        piece, met = self._stops.push(added)
        reason: FinishReason | None = None
        if met or is_end:
            reason = "stop"
        elif limits.positions is not None and position >= limits.positions:
            reason = "length"
        elif self._generated == limits.tokens:
            reason = "limit"
        if reason and not met and not (reason == "limit" and limits.keeps):
            rest, met = self._stops.push("" if self._text is None else self._text.flush())
            piece += rest if met else rest + self._stops.flush()
            reason = "stop" if met else reason
        seconds, prefill = now - self._ready, self._ready - self._started
        return Record(
            text=piece,
            token=token,
            finish_reason=reason,
            detail=limits.reason if reason == "length" else None,
            prompt_tokens=self._prompt_tokens,
            generated=self._generated,
            prefill_rate=self._prompt_tokens / prefill if prefill > 0 else 0.0,
            decode_rate=(self._generated - 1) / seconds if seconds > 0 else 0.0,
        )

    def seam(self, token: int, position: int) -> Seam:
        """What another sequence needs to go on from here."""
        opened = 0 if self._text is None else self._text.open
        counts = b"" if self._sampler is None else self._sampler.counts
        return Seam(token, position, opened, self._stops.held, counts)
