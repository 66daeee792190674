"""From a checkpoint to the graphs that are written: build, fuse, calibrate, store weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassManager

from ..graph.layers import Source
from ..graph.passes import optimise
from ..graph.passes.order import OrderInitializers
from ..graph.passes.types import TYPES, SetPrecision
from ..graph.schemes import Rounder, scheme_of
from ..graph.writer import write_graph
from ..models.load import DijiangModel
from ..progress import Progress, silent
from ..recipe import GRAPHS, Graph, Recipe, embedding_blocks, resolve
from ..runtime.sessions.inference import runs_here
from .calibration import LEAST, LENGTH, LayerMoments, batches_of, default_tokens, draw, feeds_of


def fitted(recipe: Recipe, model: DijiangModel, *, text: bool = False) -> Recipe:
    """The recipe with what depends on the model's shape decided, too; text: there is one to calibrate on."""
    rows, width = model.weights.shape("embed.weight")
    stored = scheme_of(recipe).recipe
    embed = embedding_blocks(stored.embed, rows * width / model.parameters)
    return stored.fitted(embed, calibration_tokens(recipe, model.parameters, text=text))


def calibration_tokens(recipe: Recipe, parameters: int, *, text: bool = False) -> int:
    """Tokens to calibrate on; 0 where nothing is rounded by them. Who gives a text for it has the time."""
    if not scheme_of(recipe).calibrates:
        return 0
    wanted = recipe.calibration_tokens
    return max(default_tokens(parameters), LEAST if text else 0) if wanted is None else wanted


def step_graphs(model: Source, recipe: Recipe, rounder: Rounder | None = None) -> dict[str, ir.Model]:
    """Every graph of a recipe, by name; see `step_graph`."""
    return {name: step_graph(model, name, recipe, rounder) for name in recipe.graphs}


def step_graph(model: Source, graph: str, recipe: Recipe, rounder: Rounder | None = None) -> ir.Model:
    """One graph of a model; its weights are computed when it is saved.

    rounder: of integers; None: to nearest codes.
    """
    row = GRAPHS[graph]
    skip = row.fused and (row.own_kernels or recipe.type not in TYPES)
    written = optimise(write_graph(model, graph), skip_norms=skip, operators=row.operators, centred=row.exact)
    return store_weights(written, recipe, row, tied=model.spec.tied_embeddings, rounder=rounder)


def store_weights(
    graph: ir.Model, recipe: Recipe, row: Graph, *, tied: bool, rounder: Rounder | None = None
) -> ir.Model:
    """Give an optimised float32 graph of a form the weights of a recipe."""
    passes: list[InPlacePass] = scheme_of(recipe).passes(row, tied=tied, rounder=rounder)
    if recipe.type in TYPES:
        passes.append(SetPrecision(recipe.type, fused_norms=row.fused))
    return PassManager([*passes, OrderInitializers()])(graph).model


def float_graph(model: Source) -> ir.Model:
    """The float32 graph that second moments are taken of.

    Every graph has the same projections. It is always the same one, so that all are rounded alike.
    """
    name = next(name for name, row in GRAPHS.items() if not row.operators and runs_here(name))
    return optimise(write_graph(model, name), skip_norms=False)


def drawing() -> Recipe:
    """Of the graph that draws text: in int8, which reads a quarter of float32's bytes for each token.

    The embedding, of which a token reads a row, stays. Float32 where int8 has activations in 16 bits, which are
    slow on a CPU.
    """
    quick = resolve("int8", runs_here=runs_here)
    return resolve(runs_here=runs_here) if quick.type in TYPES else replace(quick, embed=None)


def sequences(
    model: DijiangModel, recipe: Recipe, text: np.ndarray | None = None, progress: Progress = silent
) -> list[np.ndarray]:
    """What is calibrated on, [N, length] int64 each: of token ids, or of text that the model draws."""
    length = min(LENGTH, model.positions_limit or LENGTH)
    if text is not None:
        return batches_of(text, length)
    quick, tokens = drawing(), recipe.calibration_tokens or 0
    name = quick.graphs[0]
    drawn = step_graph(model, name, quick)
    return draw(drawn, GRAPHS[name], tokens, length, model.spec.vocab_size, progress)


def calibrate(model: DijiangModel, recipe: Recipe, batches: Iterable[np.ndarray]) -> LayerMoments:
    """Second moments of projections' inputs, on `sequences`."""
    graph = float_graph(model)
    return LayerMoments(graph, feeds_of(graph, batches), replaceable=recipe.budget is not None)
