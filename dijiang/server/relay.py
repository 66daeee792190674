"""From the thread of steps to the event loop: what the turns of a request are told, and their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ..batching.batcher import Batcher
from ..batching.turn import Turn
from ..errors import DijiangError
from ..runtime.sampling import largest, log_softmax
from ..runtime.sequence import Record
from .failures import Refused

#: A token and its log-probability by the model itself, then the most likely tokens and theirs.
Nats = tuple[tuple[int, float], ...]


class Told(NamedTuple):
    """A token of one of the choices; nats: None: not asked for."""

    choice: int
    record: Record
    nats: Nats | None


class Post:
    """Hands what a turn is told in the steps' thread to the event loop; see `batching.turn.Listener`.

    most: log-probabilities beside each token's own. Logits, of the vocabulary's size, do not wait for slow readers.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Told | DijiangError], choice: int, most: int
    ) -> None:
        self._loop, self._inbox, self._choice, self._most = loop, inbox, choice, most
        #: Of the prompt's ids but the first, where they are scored: whole when the first token is told.
        self.scores: list[Nats] = []

    def record(self, record: Record, logits: np.ndarray | None) -> None:
        self._send(Told(self._choice, record, None if logits is None else self._nats(record.token, logits)))

    def scored(self, ids: np.ndarray, logits: np.ndarray) -> None:
        """See `batching.turn.Turn`."""
        self.scores += map(self._nats, ids.tolist(), logits)

    def _nats(self, token: int, logits: np.ndarray) -> Nats:
        nats = log_softmax(logits)
        best = largest(logits, self._most).tolist() if self._most else []
        return tuple((one, float(nats[one])) for one in (token, *best))

    def failed(self, error: DijiangError) -> None:
        self._send(error)

    def _send(self, item: Told | DijiangError) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody listens
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, item)


class Job:
    """The turns of a request, one a choice.

    batcher: runs them.  choices: how many.  timeout: seconds that it may take, up to `deadline`, of
    `time.monotonic`.  most: see `Post`.  closed: is told once that it has ended.
    """

    def __init__(
        self,
        batcher: Batcher,
        choices: int,
        *,
        timeout: float,
        deadline: float,
        most: int,
        closed: Callable[[], None],
    ) -> None:
        self._batcher, self._choices, self._timeout, self._deadline = batcher, choices, timeout, deadline
        self._closed: Callable[[], None] | None = closed
        self._inbox: asyncio.Queue[Told | DijiangError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.posts = [Post(loop, self._inbox, choice, most) for choice in range(choices)]
        self.turns: list[Turn] = []

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def late(self) -> Refused:
        """What is said after the deadline."""
        # OpenAI's clients ask again after 408, which would take as long.
        never = {"x-should-retry": "false"}
        return Refused(
            f"the request took more than {self._timeout:g} s, its wait included; ask for fewer tokens, or later",
            status=408,
            headers=never,
        )

    async def told(self) -> AsyncGenerator[Told, None]:
        """All tokens of all choices as they come.

        Raises:
            Refused: not all came before the deadline.
            DijiangError: a step failed.
        """
        forks = {id(fork) for turn in self.turns for fork in turn.forks}
        for turn in self.turns:
            if id(turn) not in forks:
                self._batcher.submit(turn)
        timer = asyncio.get_running_loop().call_later(self.left, self._inbox.put_nowait, self.late)
        ended = 0
        try:
            while ended < self._choices:
                told = await self._inbox.get()
                if isinstance(told, DijiangError):
                    try:
                        raise told
                    finally:
                        del told  # an error holds this frame, which must not hold the error
                ended += told.record.finish_reason is not None
                yield told
        finally:
            timer.cancel()

    def close(self) -> None:
        """End what goes on still: its slots are free within one step."""
        for turn in self.turns:
            self._batcher.cancel(turn)
        if self._closed is not None:
            self._closed()
            self._closed = None
