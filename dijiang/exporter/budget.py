"""Which projections keep more bits within a size that the user chose (ADR 0038).

Every projection is rounded to both widths, as its moment is found. One of its layer's runs then has the narrow
one in its place: how far that moves what the layer passes on says what its bits are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..errors import ExportError
from ..graph.passes.linear import array_of, linears
from ..graph.roles import Role
from ..graph.rounding import ScaleType, pack, restored
from ..graph.schemes import Rounder, scheme_of
from ..graph.schemes.nbits import NBits, calibrated, mixed_inputs, mixed_weight, rotation_of, round_by
from ..progress import Progress, silent
from ..recipe import Blocks, Recipe
from .calibration import LayerMoments


@dataclass(frozen=True)
class Candidate:
    """A projection, by the name of its weight.

    more: bytes that it takes more with the bits of a budget.  change: of what its layer passes on, where it
    has not got them.
    """

    name: str
    more: int
    change: float = 0.0


def chosen(candidates: Iterable[Candidate], spare: int) -> list[str]:
    """Names of those that together take no more than `spare` bytes, the largest change for a byte first."""
    kept = []
    for candidate in sorted(candidates, key=lambda one: one.change / one.more, reverse=True):
        if candidate.more <= spare:
            kept.append(candidate.name)
            spare -= candidate.more
    return kept


def candidates_of(recipe: Recipe, graph: ir.Model) -> list[Candidate]:
    """The projections of a float32 graph, in its order, not measured yet; a recipe with a budget."""
    assert recipe.budget is not None
    wide, body = recipe.budget.blocks, _body(recipe)
    found = []
    for linear in linears(graph.graph):
        if linear.role is Role.PROJECTION:
            rows, columns = linear.shape
            more = columns * (-(-rows // body.block) * body.block) * (wide.bits - body.bits) // 8
            found.append(Candidate(str(linear.weight.name), more))
    return found


def require_budget(recipe: Recipe, graph: ir.Model, smallest: int) -> None:
    """ExportError unless the weights of a recipe can have the size of its budget.

    graph: float32.  smallest: bytes of all weights where no projection is kept.
    """
    budget = recipe.budget
    assert budget is not None
    if not recipe.calibration_tokens:
        raise ExportError(
            "a budget is spent by what calibration measures, and this export has none; "
            "add --calibration-tokens 4096, or leave --budget out"
        )
    largest = smallest + sum(candidate.more for candidate in candidates_of(recipe, graph))
    if not smallest <= budget.bytes <= largest:
        raise ExportError(
            f"budget {budget.bytes / 1e6:,.10g} MB, expected {math.ceil(smallest / 1e3) / 1e3:,.3f} "
            f"(every projection in {_body(recipe).bits} bits) to {largest // 1e3 / 1e3:,.3f} MB (in "
            f"{budget.blocks.bits}): give a size between them"
        )


def spend(
    recipe: Recipe, graph: ir.Model, moments: LayerMoments, smallest: int, folder: Path, progress: Progress = silent
) -> tuple[Recipe, Rounder]:
    """The recipe with the projections that its budget is spent on, and what rounds its weights.

    Args:
        graph: float32, with the weights that moments were taken of.
        smallest: bytes of all weights where no projection is kept.
        folder: for what was rounded, until all is written: 1.5 bytes a weight.
    """
    scheme = scheme_of(recipe)
    assert recipe.budget is not None
    assert isinstance(scheme, NBits)
    store, measured, candidates = _Store(folder), [], candidates_of(recipe, graph)
    for candidate in candidates:
        name, weight = candidate.name, array_of(graph.graph.initializers[candidate.name])
        widths = [(blocks, scheme.scales(blocks)[0]) for blocks in (recipe.budget.blocks, _body(recipe))]
        narrow = store.round(name, weight, moments(name), widths)
        measured.append(replace(candidate, change=moments.change(name, narrow)))
        progress("measure projections", len(measured), len(candidates))
    kept = chosen(measured, recipe.budget.bytes - smallest)
    return recipe.keeping(kept), store.rounder(calibrated(moments))


class _Store:
    """Rounded weights in a folder, by name and bits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, int], Path] = {}

    def round(
        self, name: str, weight: np.ndarray, moment: np.ndarray, widths: Sequence[tuple[Blocks, ScaleType]]
    ) -> np.ndarray:
        """Keep a weight as each of these blocks, alike but for their bits; what the last ones stand for."""
        last, _ = widths[-1]
        mixed, inputs = mixed_weight(weight, last), mixed_inputs(moment, last)
        for blocks, kind in widths:
            codes, scales = round_by(mixed, blocks, kind, inputs)
            file = self._files[name, blocks.bits] = self._folder / f"{len(self._files)}.npz"
            np.savez(file, codes=pack(codes, blocks.bits), scales=scales)
        return restored(codes, scales, last.bits, len(weight), rotation_of(last, len(weight)))

    def rounder(self, others: Rounder) -> Rounder:
        """What is here from its file, everything else by `others`."""

        def rounder(
            name: str, read: Callable[[], np.ndarray], rounding: Blocks, kind: ScaleType
        ) -> tuple[np.ndarray, np.ndarray]:
            file = self._files.get((name, rounding.bits))
            if file is None:
                return others(name, read, rounding, kind)
            with np.load(file) as found:
                return found["codes"], found["scales"]

        return rounder


def _body(recipe: Recipe) -> Blocks:
    assert recipe.body is not None
    return recipe.body
