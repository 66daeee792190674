"""The two sides of a verification, run over the same windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..models.load import DijiangModel
from ..models.reference import Piece, Reference
from ..progress import Progress
from ..runtime.model import Model
from ..runtime.state import State
from .difference import Sums, relative
from .parts import Call, through

#: Lengths at which windows are cut, and the states of the first one compared.
STATE_LENGTHS = (1, 8, 64, 256, 512)
#: Tokens of the longer sequence of a padded batch.
PADDED = 48
#: Where positions are far, and how many tokens are fed there.
FAR, FAR_TOKENS = 100_000, 16
#: A layer's state is compared with its own size, at least with this share of the largest layer's: that of a pruned
#: layer has no size.
LEAST_STATE = 2.0**-24


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
        batch, and the token after each; None: the session takes one sequence.
    far: [T, vocab], of the first tokens at a far position; None: there is none.
    """

    logits: list[np.ndarray]
    states: dict[int, list[np.ndarray]]
    stepped: Deviation
    padded: Deviation | None
    far: np.ndarray | None


def _cuts(length: int) -> list[int]:
    """Where a window is cut, so that its state goes on; its whole length comes last."""
    return sorted({min(cut, length) for cut in (*STATE_LENGTHS, length)})


@np.errstate(over="ignore", invalid="ignore")  # no gate passes what comes of it
def run_bundle(model: Model, windows: Sequence[np.ndarray], steps: int, far: int | None = None) -> Run:
    """Logits over windows [<= 512] of ids, and of the first `steps` tokens one at a time; far: see `far_start`.

    All of it is one list of calls, for which a model in parts loads each part once.
    """
    first = windows[0]
    states: dict[int, list[np.ndarray]] = {cut: [] for cut in _cuts(len(first))}
    beginning = _prefills(model, windows, states), _steps(model, first[:steps])
    found = through(model, chain(*beginning, _batches(model, first), _fars(model, first, far)))
    logits = [np.concatenate([next(found)[0] for _ in _cuts(len(ids))]) for ids in windows]
    stepped = Deviation.of((next(found)[0, 0], row) for row in logits[0][:steps])
    ends = [logits[0][[length - 1 for length in lengths]] for lengths in _lengths(first)]
    padded = None
    if _takes_two(model):
        padded = Deviation.of(pair for rows in ends for pair in zip(next(found)[:, 0], rows, strict=True))
    return Run(logits, states, stepped, padded, None if far is None else next(found)[0])


def far_start(limit: int | None, window: int) -> int | None:
    """A position far beyond a window, and its tables; None: the model's positions end before.

    limit: where they end, None: nowhere.
    """
    start = (FAR if limit is None else min(limit, FAR)) - FAR_TOKENS
    return start if start > window else None


def _fars(model: Model, first: np.ndarray, far: int | None) -> Iterator[Call]:
    """The first tokens after so many that left nothing behind."""
    if far is not None:
        empty = model.new_state()
        state = State(empty.layers, np.array([far]), empty.fingerprint, empty.vocab_size)
        yield Call(first[None, :FAR_TOKENS], state)


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


def _prefills(model: Model, windows: Sequence[np.ndarray], states: dict[int, list[np.ndarray]]) -> Iterator[Call]:
    """The windows, with the states of the first."""
    for ids in windows:
        state, start = model.new_state(), 0
        for cut in _cuts(len(ids)):
            yield Call(ids[None, start:cut], state, states[cut] if ids is windows[0] else None)
            start = cut


def _steps(model: Model, alone: np.ndarray) -> Iterator[Call]:
    """Tokens one at a time."""
    state = model.new_state()
    for token in alone:
        yield Call(np.array([[token]]), state)


@dataclass
class Found:
    """Sums over the logits of a side, those at a far position apart, and each layer's state error by length of the
    first window.
    """

    sums: Sums
    far: Sums
    states: dict[int, list[float]]


@np.errstate(over="ignore", invalid="ignore")  # no gate passes what comes of it
def compare(
    checkpoint: DijiangModel,
    windows: Sequence[np.ndarray],
    runs: Sequence[Run],
    twin: Reference,
    progress: Progress,
    far: int | None = None,
) -> tuple[list[Found], Found]:
    """What every run differs by from the reference in float64, which runs once for all; and what the twin does.

    twin: a reference that is rounded as the bundle is, over the same windows.  far: as of `run_bundle`.
    """
    reference = Reference(checkpoint)
    first, *others = windows
    cuts = _cuts(len(first))
    spans = [(0, start, cut) for start, cut in zip((0, *cuts), cuts, strict=False)]
    spans += [(index, 0, len(ids)) for index, ids in enumerate(others, 1)]

    def pieces(of: Reference) -> list[Piece]:
        state = of.new_state(1)
        found = [
            Piece(windows[index][None, start:cut], start, None if index else state) for index, start, cut in spans
        ]
        return found if far is None else [*found, Piece(first[None, :FAR_TOKENS], far)]

    twin_states: dict[int, list[np.ndarray]] = {cut: [] for cut in cuts}
    sums, fars = ([Sums() for _ in (*runs, twin)] for _ in range(2))
    states = [*(run.states for run in runs), twin_states]
    #: By length: of each layer the state's RMS, and of each side how far it is off.
    sizes: dict[int, list[float]] = {cut: [] for cut in cuts}
    errors: list[dict[int, list[float]]] = [{cut: [] for cut in cuts} for _ in sums]
    total = reference.dtype.itemsize * checkpoint.parameters

    def kept(layer: int, piece: Piece) -> None:
        if piece.state is not None:
            twin_states[piece.start + piece.ids.shape[1]].append(piece.state[layer].copy())

    def passed(layer: int, piece: Piece) -> None:
        if piece.state is not None:
            cut = piece.start + piece.ids.shape[1]
            sizes[cut].append(_rms(piece.state[layer]))
            for error, state in zip(errors, states, strict=True):
                error[cut].append(_rms(state[cut][layer] - piece.state[layer]))
        if piece is asked[-1]:
            progress("verify", total * (layer + 1) // checkpoint.spec.num_layers, total)

    asked = pieces(reference)
    # The twin's first logits come before the reference's: its states are there when they are compared.
    rounded, exact = twin.run(pieces(twin), kept), reference.run(asked, passed)
    for (index, start, cut), (row,), (expected,) in zip(spans, rounded, exact, strict=False):
        ids = windows[index][start : cut + 1]
        for one, logits in zip(sums, [*(run.logits[index][start:cut] for run in runs), row], strict=True):
            one.add(expected, logits, ids)
    if far is not None:
        (row,), (expected,) = next(rounded), next(exact)
        for one, logits in zip(fars, [*(run.far for run in runs), row], strict=True):
            one.add(expected, logits, first[:FAR_TOKENS])
    found = [Found(*each[:2], _shares(each[2], sizes)) for each in zip(sums, fars, errors, strict=True)]
    return found[:-1], found[-1]


def _shares(errors: dict[int, list[float]], sizes: dict[int, list[float]]) -> dict[int, list[float]]:
    """Each layer's error by length, as a share of its state."""
    found = {}
    for cut, each in errors.items():
        least = LEAST_STATE * max(sizes[cut])
        found[cut] = [relative(error, max(size, least)) for error, size in zip(each, sizes[cut], strict=True)]
    return found


def _rms(x: np.ndarray) -> float:
    return float((x**2).mean() ** 0.5)


def decay_change(stored: DijiangModel, dropped: DijiangModel, windows: Sequence[np.ndarray]) -> Sums:
    """The reference with the trained tables against the one without, over the same windows."""
    sums, pieces = Sums(), [Piece(ids[None]) for ids in windows]
    runs = (Reference(model).run(pieces) for model in (stored, dropped))
    for ids, exact, analytic in zip(windows, *runs, strict=True):
        sums.add(exact[0], analytic[0], ids)
    return sums
