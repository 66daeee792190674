"""Weights as they are, in the type of the recipe."""

from __future__ import annotations

from onnx_ir.passes import InPlacePass

from ...recipe import Graph, Recipe
from . import Rounder


class Floats:
    """See `graph.schemes.Scheme`."""

    calibrates = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def passes(self, row: Graph, *, tied: bool = False, rounder: Rounder | None = None) -> list[InPlacePass]:
        """Nothing to do: `passes.types` stores them in their type."""
        return []
