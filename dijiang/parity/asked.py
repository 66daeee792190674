"""What a verification asks a bundle, and what the bundle answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ..runtime.model import Model
from ..runtime.state import State
from .parts import Call, through

#: Lengths at which windows are cut, and the states of the first one compared.
STATE_LENGTHS = (1, 8, 64, 256, 512)
#: Tokens of the longer sequence of a padded batch.
PADDED = 48
#: Where positions are far, and how many tokens are fed there.
FAR, FAR_TOKENS = 100_000, 16


@dataclass(frozen=True)
class Asked:
    """The tokens that both sides of a verification are given.

    windows: of ids, [<= 512] each.  steps: of the first window, so many tokens one at a time, too.
    far: position at which its first FAR_TOKENS tokens are fed, too; None: see `far_start`.
    """

    windows: Sequence[np.ndarray]
    steps: int
    far: int | None

    @property
    def first(self) -> np.ndarray:
        """The first window, whose states are compared."""
        return self.windows[0]

    @property
    def distant(self) -> np.ndarray:
        """The ids at the far position."""
        return self.first[:FAR_TOKENS]


def far_start(limits: Iterable[int | None], window: int) -> int | None:
    """A position far beyond a window, and its tables; None: positions end before.

    limits: where they end, by each of those who say; None: nowhere.
    """
    start = min([FAR, *(limit for limit in limits if limit is not None)]) - FAR_TOKENS
    return start if start > window else None


def cuts(length: int) -> list[int]:
    """Where a window is cut, so that its state goes on; its whole length comes last."""
    return sorted({min(cut, length) for cut in (*STATE_LENGTHS, length)})


@dataclass(frozen=True)
class Deviation:
    """How far the logits of `tokens` tokens are off where they should be the same: the most, and RMS."""

    max_error: float
    rms: float
    tokens: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Deviation:
        """Of pairs of logits [vocab]; NaN stays."""
        most, squares, count = 0.0, 0.0, 0
        for one, other in pairs:
            difference = np.abs(one.astype(np.float64) - other)
            most = float(np.maximum(most, difference.max()))
            squares, count = squares + float((difference**2).mean()), count + 1
        return cls(most, (squares / count) ** 0.5, count)


@dataclass(frozen=True)
class Run:
    """What the bundle computed, kept while the reference runs.

    logits: [T, vocab] float32 a window.  states: by length of the first window, [1, G, K, V] a layer.
    stepped: the first tokens one at a time, against the window at once.  padded: two beginnings of it as one padded
        batch, and the token after each; None: the session takes one sequence. Where a step rounds other numbers
        than a window, both are of the graph that rounds none, and the first logits are those of steps.
    far: [T, vocab], of the first tokens at a far position; None: there is none.
    """

    logits: list[np.ndarray]
    states: dict[int, list[np.ndarray]]
    stepped: Deviation
    padded: Deviation | None
    far: np.ndarray | None


@np.errstate(over="ignore", invalid="ignore")  # no gate passes what comes of it
def run_bundle(model: Model, asked: Asked, *, exact: bool = True) -> Run:
    """What one graph of a bundle makes of what it is asked.

    All of it is one list of calls, for which a model in parts loads each part once.

    exact: a step rounds what a window rounds. Else the first logits are those of steps, and `with_calls` follows.
    """
    first = asked.first
    states: dict[int, list[np.ndarray]] = {cut: [] for cut in cuts(len(first))}
    batches = _batches(model, first) if exact else []
    found = through(
        model, chain(_prefills(model, asked, states), _steps(model, asked), batches, _fars(model, asked))
    )
    logits = [np.concatenate([next(found)[0] for _ in cuts(len(ids))]) for ids in asked.windows]
    steps = [next(found)[0, 0] for _ in first[: asked.steps]]
    stepped, padded = Deviation.of(zip(steps, logits[0], strict=False)), None
    if exact and _takes_two(model):
        ends = [logits[0][[length - 1 for length in lengths]] for lengths in _lengths(first)]
        padded = Deviation.of(pair for rows in ends for pair in zip(next(found)[:, 0], rows, strict=True))
    far = None if asked.far is None else next(found)[0]
    if not exact:
        logits[0][: len(steps)] = steps
    return Run(logits, states, stepped, padded, far)


def with_calls(run: Run, model: Model, asked: Asked) -> Run:
    """A run with the steps and batches of another model: its graph, whose matmuls do not round their inputs."""
    beginning = asked.first[: max(asked.steps, PADDED + 1)]
    other = run_bundle(model, replace(asked, windows=[beginning], far=None))
    return replace(run, stepped=other.stepped, padded=other.padded)


def _prefills(model: Model, asked: Asked, states: dict[int, list[np.ndarray]]) -> Iterator[Call]:
    """The windows, with the states of the first."""
    for index, ids in enumerate(asked.windows):
        state, start = model.new_state(), 0
        for cut in cuts(len(ids)):
            yield Call(ids[None, start:cut], state, None if index else states[cut])
            start = cut


def _steps(model: Model, asked: Asked) -> Iterator[Call]:
    """The first tokens one at a time."""
    state = model.new_state()
    for token in asked.first[: asked.steps]:
        yield Call(np.array([[token]]), state)


def _takes_two(model: Model) -> bool:
    """Whether a step may have two sequences."""
    return model.session.rows is None or model.session.rows > 1


def _lengths(first: np.ndarray) -> list[tuple[int, int]]:
    """Of two beginnings of a window: in a batch, and after one more step."""
    long = min(len(first), PADDED)
    short = (long + 2) // 3
    return [(long, short), *([(long + 1, short + 1)] if long < len(first) else [])]


def _batches(model: Model, first: np.ndarray) -> Iterator[Call]:
    """Two beginnings of a window, the shorter one padded on the left, and then the next token of each."""
    if not _takes_two(model):
        return
    state, before = model.new_state(2), (0, 0)
    for lengths in _lengths(first):
        rows = [first[start:end] for start, end in zip(before, lengths, strict=True)]
        widest = max(map(len, rows))
        ids, real = (np.zeros((2, widest), np.int64) for _ in range(2))
        for row, fed in enumerate(rows):
            ids[row, widest - len(fed) :], real[row, widest - len(fed) :] = fed, 1
        yield Call(ids, state, real=real)
        before = lengths


def _fars(model: Model, asked: Asked) -> Iterator[Call]:
    """The first tokens after so many that left nothing behind."""
    if asked.far is not None:
        empty = model.new_state()
        state = State(empty.layers, np.array([asked.far]), empty.fingerprint, empty.vocab_size)
        yield Call(asked.distant[None], state)
