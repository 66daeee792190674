"""Who is fed, who decodes, who waits."""

from __future__ import annotations

import heapq
from collections import deque

from .turn import Turn


class Scheduler:
    """Turns on their way: waiting, having their prompt fed, running.

    At most `slots` of them are fed or run. A waiting turn of a better priority takes the place of the running
    one that is last in rank; that one keeps its state and waits.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.feeding: deque[Turn] = deque()
        self.running: list[Turn] = []
        self._waiting: list[Turn] = []

    @property
    def waiting(self) -> int:
        """Turns without a slot."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether there is any turn."""
        return bool(self._waiting or self.feeding or self.running)

    def add(self, turn: Turn) -> None:
        """Let a turn wait; one that was swapped out, or whose prompt was fed, too."""
        heapq.heappush(self._waiting, turn)

    def drop_cancelled(self) -> None:
        """Forget turns that nobody wants any more."""
        self._waiting = [turn for turn in self._waiting if not turn.cancelled]
        heapq.heapify(self._waiting)
        self.feeding = deque(turn for turn in self.feeding if not turn.cancelled)
        self.running = [turn for turn in self.running if not turn.cancelled]

    def admit(self) -> list[Turn]:
        """Give slots to those who wait, the best first; the running turns that had to go, to be swapped out."""
        out: list[Turn] = []
        while self._waiting:
            if len(self.feeding) + len(self.running) >= self.slots:
                last = max(self.running, default=None)
                if last is None or last.rank[0] <= self._waiting[0].rank[0]:
                    break
                self.running.remove(last)
                out.append(last)
            turn = heapq.heappop(self._waiting)
            (self.feeding if turn.left else self.running).append(turn)
        for turn in out:
            self.add(turn)
        return out

    def next_fed(self) -> Turn | None:
        """Whose prompt gets the next piece: each in turn, so that a long prompt does not hold up a short one."""
        self.feeding.rotate(-1)
        return self.feeding[-1] if self.feeding else None

    def fed(self, turn: Turn) -> None:
        """All of its prompt was fed and its first token chosen: it runs."""
        self.feeding.remove(turn)
        self.running.append(turn)

    def end(self, turn: Turn) -> None:
        """It has ended, wherever it was."""
        for turns in (self.feeding, self.running):
            if turn in turns:
                turns.remove(turn)

    def clear(self) -> list[Turn]:
        """All turns, which are forgotten."""
        turns = [*self._waiting, *self.feeding, *self.running]
        self._waiting, self.feeding, self.running = [], deque(), []
        return turns
