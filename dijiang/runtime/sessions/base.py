"""Running a graph: one step in, one output out."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..state import State
from ..step import Step

#: Tokens of a prompt that go through the graph at once: bounds the memory of a prefill.
PIECE = 256


class Output(Protocol):
    """Results of the kept tokens; each is fetched when it is asked for, before the next step.

    Of a ragged step B is the number of sequences whose results were wanted, in their order, and N is 1.
    """

    @property
    def logits(self) -> np.ndarray:
        """[B, N, vocab] float32."""

    @property
    def tokens(self) -> np.ndarray:
        """The most likely next tokens, [B, N] int64."""


class Session(Protocol):
    """One graph of a bundle, loaded.

    longest: tokens a step at most.  rows: sequences, None: no end.  ragged: whether it takes `Step.ragged`.
    provider: what runs it, in its own words.  graph: its name.
    """

    @property
    def longest(self) -> int: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def ragged(self) -> bool: ...
    @property
    def provider(self) -> str: ...
    @property
    def graph(self) -> str: ...

    def step(self, state: State) -> Step:
        """A step of one token a sequence, on memory that `run` need not copy."""

    def run(self, step: Step, state: State) -> Output:
        """Advance the state over a step; whatever interrupts it, layers and position stay together."""
