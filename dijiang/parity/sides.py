"""The two sides of a verification, run over the same windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..models.load import DijiangModel
from ..models.reference import Piece, Reference
from ..progress import Progress
from ..runtime.model import Model
from .difference import Sums
from .parts import Call, through

#: Lengths at which windows are cut, and the states of the first one compared.
STATE_LENGTHS = (1, 8, 64, 256, 512)


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


def compare(
    checkpoint: DijiangModel,
    windows: Sequence[np.ndarray],
    runs: Sequence[Run],
    progress: Progress,
    *,
    float32: bool,
) -> tuple[list[tuple[Sums, dict[int, list[float]]]], Sums | None]:
    """For each run: sums over the logits, and each layer's state error by length of the first window.

    float32: also what float32 arithmetic itself loses: the float32 reference on the first window.
    The reference in float64 runs once for all.
    """
    plain = Reference(checkpoint, np.float32).forward(windows[0][None])[0] if float32 else None
    lost = Sums()
    reference = Reference(checkpoint)
    first, *others = windows
    state, cuts = reference.new_state(1), _cuts(len(first))
    spans = [(0, start, cut) for start, cut in zip((0, *cuts), cuts, strict=False)]
    pieces = [Piece(first[None, start:cut], start, state) for _, start, cut in spans]
    pieces += [Piece(ids[None]) for ids in others]
    spans += [(index, 0, len(ids)) for index, ids in enumerate(others, 1)]
    found: list[tuple[Sums, dict[int, list[float]]]] = [(Sums(), {cut: [] for cut in cuts}) for _ in runs]
    total = reference.dtype.itemsize * checkpoint.parameters

    def passed(layer: int, piece: Piece) -> None:
        if piece.state is not None:
            cut = piece.start + piece.ids.shape[1]
            for run, (_, errors) in zip(runs, found, strict=True):
                errors[cut].append(_relative(run.states[cut][layer], piece.state[layer]))
        if piece is pieces[-1]:
            progress("verify", total * (layer + 1) // checkpoint.spec.num_layers, total)

    for (index, start, cut), (rows,) in zip(spans, reference.run(pieces, passed), strict=True):
        ids = windows[index][start : cut + 1]
        for run, (sums, _) in zip(runs, found, strict=True):
            sums.add(rows, run.logits[index][start:cut], ids)
        if plain is not None and index == 0:
            lost.add(rows, plain[start:cut], ids)
    return found, None if plain is None else lost


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2).mean() ** 0.5 / (expected**2).mean() ** 0.5)


def decay_change(stored: DijiangModel, dropped: DijiangModel, windows: Sequence[np.ndarray]) -> Sums:
    """The reference with the trained tables against the one without, over the same windows."""
    sums, pieces = Sums(), [Piece(ids[None]) for ids in windows]
    runs = (Reference(model).run(pieces) for model in (stored, dropped))
    for ids, exact, analytic in zip(windows, *runs, strict=True):
        sums.add(exact[0], analytic[0], ids)
    return sums
