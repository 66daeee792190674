"""Several tokens a call: drafts from the text so far, checked by the model itself.

What followed the last earlier place of the final tokens is proposed (prompt lookup). One call checks all of it.
Where not all is right, the state goes back to where it was before the call: a piece of several tokens writes to
new arrays, so the old ones are still there. The tokens that were right wait, and are fed with the next draft. The
text is that of decoding one token a call: see `can_speculate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ..bundle.manifest import Manifest
from ..recipe import GRAPHS
from .sampling import most_likely
from .sequence import Record, Sequence
from .sessions.base import Output, Session
from .state import Point, State
from .step import Step

#: Final tokens that are looked up, the most first.
MATCHED = (3, 2)
#: Tokens of a draft at most.
LONGEST = 4
#: Tokens that wait to be fed at most; with more of them a call has no draft.
WAITING = 8
#: Tokens of the text that are looked through.
WINDOW = 1 << 14


def can_speculate(manifest: Manifest, graph: str) -> bool:
    """Whether a token has the same bits whatever is fed with it: integers in a graph with our matmul."""
    return manifest.recipe.in_blocks and GRAPHS[graph].matmul


class Lookup:
    """Where each pair and triple of a text stood last, of the last WINDOW tokens or some more."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self.add(ids)

    def add(self, ids: Iterable[int]) -> None:
        """More tokens at the end of the text."""
        for token in ids:
            if len(self._text) >= 2 * WINDOW:
                text, self._text, self._places = self._text[-WINDOW:], [], {}
                self.add(text)
            for matched in MATCHED:
                self._places[tuple(self._text[-matched:])] = len(self._text)
            self._text.append(token)

    def draft(self, longest: int) -> list[int]:
        """What followed the last earlier place of the final tokens: at most `longest` tokens, or none."""
        for matched in MATCHED:
            place = self._places.get(tuple(self._text[-matched:]))
            if place is not None:
                return self._text[place : place + longest]
        return []


def decode_drafts(
    session: Session, output: Output, state: State, sequence: Sequence, known: Iterable[int], limit: int | None
) -> Iterator[Record]:
    """Records of one sequence of most likely tokens until it ends.

    output: of the last token fed.  known: the text so far.  limit: positions that a sequence has, None: no end.

    Between records the state may lag behind. It is never ahead: what was right is taken over when all of it was
    told. When it is copied or saved, and when the generator ends or is closed, it is advanced over every token that
    was told but the last.
    """
    lookup = Lookup(known)
    start = int(state.position[0])  # of the first token that waits
    waiting: list[int] = []  # told, and not in the state
    chosen = [most_likely(output, 0, 0, start)]
    before: Point | None = None  # a call that had a draft
    right: Point | None = None  # after a call, if all that it was fed was right

    def catch_up() -> None:
        nonlocal start, waiting, before, right
        _settle(session, state, start, waiting, before)
        start, waiting, before, right = start + max(0, len(waiting) - 1), waiting[-1:], None, None

    try:
        while True:
            for token in chosen:
                position = start + len(waiting)
                record = sequence.push(token, position)
                state.leave(0, sequence.seam(token, position))
                waiting.append(token)
                lookup.add([token])
                with state.lagging(catch_up):
                    yield record
                if record.finish_reason:
                    return
            with state.guard:  # a copy of another thread sees what was told, and nothing of a draft
                if right is not None:
                    state.commit(right)
                    start, waiting = start + len(waiting) - 1, waiting[-1:]
                room = LONGEST if limit is None else min(LONGEST, limit - start - len(waiting))
                proposed = lookup.draft(room) if len(waiting) <= WAITING and room > 0 else []
                before = state.point if proposed else None
                output = _call(session, state, waiting, proposed)
                chosen = _agreed(output, proposed, start + len(waiting))
                right = state.point if len(chosen) > len(proposed) else None
                if before is not None:
                    state.commit(before)
    finally:
        _settle(session, state, start, waiting, before)


def _call(session: Session, state: State, waiting: list[int], proposed: list[int]) -> Output:
    """Feed both; results of the last token that waits, and of each that is proposed."""
    ids = np.array([waiting + proposed])
    kept = np.arange(len(waiting) - 1, ids.shape[1])[None]
    return session.run(Step.of(ids, state.position, kept), state)


def _agreed(output: Output, proposed: list[int], position: int) -> list[int]:
    """What the model says from a position on: the proposed tokens as far as they are right, and one more."""
    chosen: list[int] = []
    while chosen == proposed[: len(chosen)] and len(chosen) <= len(proposed):
        chosen.append(most_likely(output, 0, len(chosen), position + len(chosen)))
    return chosen


def _settle(session: Session, state: State, start: int, waiting: list[int], before: Point | None) -> None:
    """Advance the state over every token that was told but the last, from wherever the last call left it."""
    if before is not None and int(state.position[0]) >= start + len(waiting):  # interrupted before it was judged
        state.commit(before)
    missing = waiting[int(state.position[0]) - start : -1]
    if missing:
        session.run(Step.of(np.array([missing]), state.position, np.array([[len(missing) - 1]])), state)
