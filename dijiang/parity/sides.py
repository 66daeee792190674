"""The two sides of a verification: what a bundle answered, and what the reference says of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..models.load import DijiangModel
from ..models.reference import Piece, Reference
from ..progress import Progress
from .asked import Asked, Run, cuts
from .difference import Sums, relative

#: A layer's state is compared with its own size, at least with this share of the largest layer's: that of a pruned
#: layer has no size.
LEAST_STATE = 2.0**-24


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
    checkpoint: DijiangModel, asked: Asked, runs: Sequence[Run], twin: Reference, progress: Progress
) -> tuple[list[Found], Found]:
    """What every run differs by from the reference in float64, which runs once for all; and what the twin does.

    twin: a reference that is rounded as the bundle is, for the same tokens.
    """
    reference = Reference(checkpoint)
    lengths = cuts(len(asked.first))
    spans = [(0, start, cut) for start, cut in zip((0, *lengths), lengths, strict=False)]
    spans += [(index, 0, len(ids)) for index, ids in enumerate(asked.windows) if index]

    def pieces(of: Reference) -> list[Piece]:
        state = of.new_state(1)
        found = [
            Piece(asked.windows[index][None, start:cut], start, None if index else state)
            for index, start, cut in spans
        ]
        return found if asked.far is None else [*found, Piece(asked.distant[None], asked.far)]

    twin_states: dict[int, list[np.ndarray]] = {cut: [] for cut in lengths}
    sums, fars = ([Sums() for _ in (*runs, twin)] for _ in range(2))
    states = [*(run.states for run in runs), twin_states]
    #: By length: of each layer the state's RMS, and of each side how far it is off.
    sizes: dict[int, list[float]] = {cut: [] for cut in lengths}
    errors: list[dict[int, list[float]]] = [{cut: [] for cut in lengths} for _ in sums]
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
        if piece is exactly[-1]:
            progress("verify", total * (layer + 1) // checkpoint.spec.num_layers, total)

    exactly = pieces(reference)
    # The twin's first logits come before the reference's: its states are there when they are compared.
    rounded, exact = twin.run(pieces(twin), kept), reference.run(exactly, passed)
    answers = [
        (sums, asked.windows[index][start : cut + 1], [run.logits[index][start:cut] for run in runs])
        for index, start, cut in spans
    ]
    if asked.far is not None:
        answers.append((fars, asked.distant, [run.far for run in runs if run.far is not None]))
    for (into, ids, each), (row,), (expected,) in zip(answers, rounded, exact, strict=True):
        for one, logits in zip(into, [*each, row], strict=True):
            one.add(expected, logits, ids)
    found = [Found(near, far, _shares(error, sizes)) for near, far, error in zip(sums, fars, errors, strict=True)]
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
