"""How weights are stored: objects that own nodes, packing and calibration of one row of `recipe.SCHEMES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from onnx_ir.passes import InPlacePass

from ...recipe import SCHEMES, Blocks, Graph, Recipe, named
from ..rounding import ScaleType

#: The second moment [in, in] float32 of a linear's inputs, by the name of its weight. Each is asked for once,
#: when its weight is written, in the order of the graph, and is overwritten by who asks.
Moments = Callable[[str], np.ndarray]
#: How a weight becomes integers: (its name, what reads it [in, out] float32, blocks, type of their scales) ->
#: packed codes uint8 [out, blocks, bytes] and scales float32 [out, blocks].
Rounder = Callable[[str, Callable[[], np.ndarray], Blocks, ScaleType], tuple[np.ndarray, np.ndarray]]


class Scheme(Protocol):
    """One way to store the projections, the head and the embedding; made as `scheme(recipe)`.

    recipe: with the blocks that it really stores.
    """

    recipe: Recipe

    @property
    def calibrates(self) -> bool:
        """Whether weights are rounded by what their inputs look like."""

    def passes(self, row: Graph, *, tied: bool = False, rounder: Rounder | None = None) -> list[InPlacePass]:
        """What turns a float32 graph into one of stored weights.

        row: the form of the graph.  tied: the head is the transposed embedding.  rounder: None: nearest
        values.
        """


@dataclass
class Floats:
    """See `Scheme`: weights as they are. `passes.types` stores them in the type of the recipe."""

    recipe: Recipe
    calibrates = False

    def passes(self, row: Graph, *, tied: bool = False, rounder: Rounder | None = None) -> list[InPlacePass]:
        """Nothing to do."""
        return []


def scheme_of(recipe: Recipe) -> Scheme:
    """The scheme of a recipe."""
    return named(SCHEMES[recipe.scheme].code)(recipe)
