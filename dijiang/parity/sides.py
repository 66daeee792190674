"""The two sides of a verification, run over the same windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..models.load import DijiangModel
from ..models.reference import Piece, Reference
from ..progress import Progress
from ..runtime.model import Model
from .difference import Sums, relative
from .parts import Call, through

#: Lengths at which windows are cut, and the states of the first one compared.
STATE_LENGTHS = (1, 8, 64, 256, 512)
#: A layer's state is compared with its own size, at least with this share of the largest layer's: that of a pruned
#: layer has no size.
LEAST_STATE = 2.0**-24


@dataclass(frozen=True)
class Run:
    """What the bundle computed, kept while the reference runs.

    logits: [T, vocab] float32 a window.  states: by length of the first window, [1, G, K, V] a layer.
    step_error, step_rms: largest and RMS difference of steps from the prefill.
    """

    logits: list[np.ndarray]
    states: dict[int, list[np.ndarray]]
    step_error: float
    step_rms: float
    steps: int


def _cuts(length: int) -> list[int]:
    """Where a window is cut, so that its state goes on; its whole length comes last."""
    return sorted({min(cut, length) for cut in (*STATE_LENGTHS, length)})


@np.errstate(over="ignore", invalid="ignore")  # no gate passes what comes of it
def run_bundle(model: Model, windows: Sequence[np.ndarray], steps: int) -> Run:
    """Logits over windows [<= 512] of ids, and of the first `steps` tokens one at a time.

    All of it is one list of calls, for which a model in parts loads each part once.
    """
    first = windows[0]
    states: dict[int, list[np.ndarray]] = {cut: [] for cut in _cuts(len(first))}
    found = through(model, _calls(model, windows, first[:steps], states))
    logits = [np.concatenate([next(found) for _ in _cuts(len(ids))]) for ids in windows]
    step_error = squares = 0.0
    for row, step in zip(logits[0], found, strict=False):
        difference = np.abs(step[0].astype(np.float64) - row)
        step_error = float(np.maximum(step_error, difference.max()))  # keeps NaN
        squares += float((difference**2).mean())
    count = min(steps, len(first))
    return Run(logits, states, step_error, (squares / count) ** 0.5, count)


def _calls(
    model: Model, windows: Sequence[np.ndarray], alone: np.ndarray, states: dict[int, list[np.ndarray]]
) -> Iterator[Call]:
    """All that a bundle is asked: the windows, with the states of the first, and its tokens alone."""
    for ids in windows:
        state, start = model.new_state(), 0
        for cut in _cuts(len(ids)):
            yield Call(ids[None, start:cut], state, states[cut] if ids is windows[0] else None)
            start = cut
    state = model.new_state()
    for token in alone:
        yield Call(np.array([[token]]), state)


@dataclass
class Found:
    """Sums over the logits of a side, and each layer's state error by length of the first window."""

    sums: Sums
    states: dict[int, list[float]]


@np.errstate(over="ignore", invalid="ignore")  # no gate passes what comes of it
def compare(
    checkpoint: DijiangModel,
    windows: Sequence[np.ndarray],
    runs: Sequence[Run],
    twin: Reference,
    progress: Progress,
) -> tuple[list[Found], Found]:
    """What every run differs by from the reference in float64, which runs once for all; and what the twin does.

    twin: a reference that is rounded as the bundle is, over the same windows.
    """
    reference = Reference(checkpoint)
    first, *others = windows
    cuts = _cuts(len(first))
    spans = [(0, start, cut) for start, cut in zip((0, *cuts), cuts, strict=False)]
    spans += [(index, 0, len(ids)) for index, ids in enumerate(others, 1)]

    def pieces(of: Reference) -> list[Piece]:
        state = of.new_state(1)
        return [
            Piece(windows[index][None, start:cut], start, None if index else state) for index, start, cut in spans
        ]

    twin_states: dict[int, list[np.ndarray]] = {cut: [] for cut in cuts}
    sums, states = [Sums() for _ in (*runs, twin)], [*(run.states for run in runs), twin_states]
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
    for (index, start, cut), (row,), (expected,) in zip(spans, rounded, exact, strict=True):
        ids = windows[index][start : cut + 1]
        for one, logits in zip(sums, [*(run.logits[index][start:cut] for run in runs), row], strict=True):
            one.add(expected, logits, ids)
    found = [Found(one, _shares(error, sizes)) for one, error in zip(sums, errors, strict=True)]
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
