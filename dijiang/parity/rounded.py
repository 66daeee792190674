"""The reference with everything rounded that a recipe rounds: what rounding itself costs a model.

A naive twin of what `export` and the graphs do. Weights and inputs of projections become the nearest numbers of
their type, or the nearest integers of their blocks; nothing is fitted to the inputs. It shares with them which
channels are mixed and by what matrix, and no code that rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from ..graph.passes.types import TYPES
from ..graph.rounding import hadamard
from ..graph.schemes import scheme_of
from ..graph.schemes.dequantize import CODES, block_of
from ..graph.schemes.nbits import rotation_of
from ..models.load import DijiangModel
from ..models.reference import Array, LayerWeights, Reference
from ..recipe import SCHEMES, Blocks, Recipe

#: Rows rounded at once: bounds the temporaries.
ROWS = 1024
#: Modules whose weights may be in blocks, by the last part of their names; `proj` is the feature map.
PROJECTIONS = ("qkv", "gate", "out", "mlp_up", "mlp_gate", "mlp_down", "embed_in", "embed_out")


class Rounded(Reference):
    """`Reference` in float32, rounded as a recipe says; with nothing to round it is plain float32."""

    def __init__(self, model: DijiangModel, recipe: Recipe) -> None:
        super().__init__(model, np.float32)
        self._recipe = recipe
        self._weights = RoundedWeights(model.weights, recipe, tied=model.spec.tied_embeddings)

    def _linear(self, w: LayerWeights, name: str, x: Array) -> Array:
        blocks = _blocks_of(self._recipe, name, x.shape[-1])
        bits = SCHEMES[self._recipe.scheme].input_bits
        if blocks is not None and bits is not None:
            return super()._linear(w, name, in_blocks(x, replace(blocks, bits=bits)))
        return super()._linear(w, name, in_type(x, self._recipe.type))


class RoundedWeights(Mapping[str, Array]):
    """Canonical weights by name, each rounded when it is read."""

    def __init__(self, weights: Mapping[str, Array], recipe: Recipe, *, tied: bool) -> None:
        self._weights, self._recipe, self._tied = weights, recipe, tied

    def __getitem__(self, name: str) -> Array:
        weight = np.asarray(self._weights[name], np.float32)
        module, _, part = name.rpartition(".")
        if name == "embed.weight":
            blocks = self._embedding(weight.shape[1])
            return in_type(weight, self._recipe.type) if blocks is None else in_blocks(weight, blocks)
        blocks = _blocks_of(self._recipe, module, len(weight)) if part == "weight" else None
        return in_type(weight, self._recipe.type) if blocks is None else in_blocks(weight.T, blocks).T

    def _embedding(self, width: int) -> Blocks | None:
        """A tied table is read from the head's blocks, where they fit a row."""
        recipe, embed = self._recipe, scheme_of(self._recipe).recipe.embed
        if not SCHEMES[recipe.scheme].mixed or embed is None:
            return None
        if self._tied and recipe.head is not None and width % recipe.head.block == 0:
            return recipe.head
        return embed

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _blocks_of(recipe: Recipe, module: str, width: int) -> Blocks | None:
    """How the weight of a module with `width` inputs is stored, by the module's name or the last part of it."""
    if module == "head":
        blocks = recipe.head
    elif module.rpartition(".")[2] in PROJECTIONS:
        blocks = recipe.projection(_stored_in(recipe, f"{module}.weight"))
    else:
        return None
    if blocks is None or SCHEMES[recipe.scheme].mixed:
        return blocks
    block = block_of(width, CODES[blocks.bits])  # TensorRT reads whole blocks only
    return replace(blocks, block=block, rotation=0) if block else None


def _stored_in(recipe: Recipe, name: str) -> str:
    """The weight that a graph keeps one in, as a budget names it: several side by side, some with a norm's."""
    kept = () if recipe.budget is None else recipe.budget.kept
    return next((whole for whole in kept if name in whole.replace(".normed", "").split("+")), name)


def in_blocks(x: Array, blocks: Blocks) -> Array:
    """[..., width] float32 as the nearest integers of each row's blocks stand for it, mixed before and after."""
    rows = x.reshape(-1, x.shape[-1])
    nearest = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        nearest[part] = _nearest(rows[part], blocks)
    return nearest.reshape(x.shape)


def _nearest(rows: Array, blocks: Blocks) -> Array:
    width = rows.shape[-1]
    matrix = hadamard(rotation_of(blocks, width))

    def mixed(rows: Array) -> Array:
        return (rows.reshape(-1, len(matrix)) @ matrix).reshape(-1, width)

    padded = np.pad(mixed(rows), ((0, 0), (0, -width % blocks.block))).reshape(len(rows), -1, blocks.block)
    scale = np.abs(padded).max(-1, keepdims=True) / np.float32(2 ** (blocks.bits - 1) - 1)
    scale[scale == 0] = 1
    return mixed((np.rint(padded / scale) * scale).reshape(len(rows), -1)[:, :width])


def in_type(x: Array, type_: str) -> Array:
    """Float32 rounded to a type of 16 bits, as float32; in fp32 as it is."""
    return x.astype(TYPES[type_].numpy()).astype(np.float32) if type_ in TYPES else x
