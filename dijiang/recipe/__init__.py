"""What a bundle is made of, decided once: the tables, and `resolve`.

Rows are data. Where a row stands for code it names it by import path, so that the runtime can read the
tables without importing onnx. A new precision, graph, weight scheme or target is one row here and, where
it does something new, one function. Nothing else compares their names: code asks the `Recipe` that
`export` resolved and the manifest keeps.
"""

from .backends import PROVIDERS, Provider
from .forms import GRAPHS, SCHEMES, Graph, Scheme
from .precisions import (
    BLOCK,
    BLOCKS,
    FLOAT32_FACTOR,
    HEADS,
    PRECISIONS,
    ROTATION,
    TYPE_BYTES,
    Blocks,
    Gate,
    Precision,
    embedding_blocks,
)
from .recipe import AUTO, Budget, Recipe, by_target, resolve, with_budget
from .rows import named, require
from .targets import TARGETS, Target

__all__ = [
    "AUTO",
    "BLOCK",
    "BLOCKS",
    "FLOAT32_FACTOR",
    "GRAPHS",
    "HEADS",
    "PRECISIONS",
    "PROVIDERS",
    "ROTATION",
    "SCHEMES",
    "TARGETS",
    "TYPE_BYTES",
    "Blocks",
    "Budget",
    "Gate",
    "Graph",
    "Precision",
    "Provider",
    "Recipe",
    "Scheme",
    "Target",
    "by_target",
    "embedding_blocks",
    "named",
    "require",
    "resolve",
    "with_budget",
]
