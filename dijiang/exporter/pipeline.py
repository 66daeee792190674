"""From a checkpoint to the graph that is written: build, fuse, calibrate, quantize."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from ..graph.attention import DIALECTS
from ..graph.native import NativeWriter
from ..graph.passes import optimise
from ..graph.passes.dequantize import DequantizeWeights
from ..graph.passes.order import OrderInitializers
from ..graph.passes.quantize import Quantize
from ..graph.passes.types import TYPES, SetPrecision
from ..graph.precision import Precision, Rounding
from ..graph.writer import Writer
from ..models.load import DijiangModel
from ..progress import Progress, silent
from .calibration import Moments, default_tokens, second_moments

#: Share of the parameters from which on the embedding takes part in rounding to 4 bits. A step reads one
#: row of it, so a smaller one costs no time and little space at 8 bits, and its rounding is felt.
EMBEDDING_SHARE = 0.25
#: Dialects that have weights in blocks of integers: ONNX Runtime's nodes, or DequantizeLinear.
INTEGERS = ("native", "ort", "primitive")


def build_graph(model: DijiangModel, dialect: str) -> ir.Model:
    """The graph before any pass."""
    return (NativeWriter(model) if dialect == "native" else Writer(model, DIALECTS[dialect])).write()


def step_graph(
    model: DijiangModel,
    dialect: str,
    precision: Precision,
    moments: Moments | None = None,
    *,
    cuda: bool = False,
) -> ir.Model:
    """The graph of a checkpoint; its weights are computed when it is saved.

    moments: of `calibrate`; used up on the way. None: 4-bit weights go to their nearest codes.
    cuda: weights in blocks of integers are for the kernels of CUDA, with activations in fp16.
    """
    fused = DIALECTS[dialect].fused
    blocks_on_gpu = precision.quantized and (cuda or dialect == "primitive")
    types = "fp16" if blocks_on_gpu else precision.type
    graph = optimise(build_graph(model, dialect), skip_norms=fused and types == "fp32")
    if precision.body is not None and dialect == "primitive":
        DequantizeWeights(f"int{precision.body.bits}")(graph)
    elif precision.quantized:
        # One row of the embedding is read in a step: on a GPU it stays in fp16, whose lookup is exact.
        precision = replace(precision, embed=None) if cuda else _with_embedding(precision, model)
        Quantize(precision, moments, tied=model.spec.tied_embeddings, cuda=cuda)(graph)
    if types in TYPES:
        SetPrecision(types, fused_norms=fused)(graph)
    OrderInitializers()(graph)
    return graph


def calibration_tokens(
    model: DijiangModel, dialect: str, precision: Precision, wanted: int | None
) -> int:
    """Tokens to calibrate on; 0 where nothing is rounded by them. wanted: None: what pays."""
    if dialect == "primitive" or precision.body is None or precision.body.bits > 4:
        return 0
    return default_tokens(model.parameters) if wanted is None else wanted


def calibrate(model: DijiangModel, dialect: str, tokens: int, progress: Progress = silent) -> Moments:
    """Second moments of every projection's inputs, on text that the float32 model draws."""
    # The operator of the native dialect has the same projections around it as the nodes it stands for.
    graph = optimise(build_graph(model, "ort" if dialect == "native" else dialect), skip_norms=False)
    return second_moments(graph, tokens, model.positions_limit, model.spec.vocab_size, progress)


def _with_embedding(precision: Precision, model: DijiangModel) -> Precision:
    embed = precision.embed
    rows, width = model.weights.shape("embed.weight")
    if embed is None or rows * width >= EMBEDDING_SHARE * model.parameters:
        return precision
    return replace(precision, embed=Rounding(8, embed.block))
