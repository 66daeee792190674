"""From a checkpoint to the graph that is written: build, fuse, calibrate, quantize."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from ..models.load import DijiangModel
from .attention import DIALECTS
from .calibration import Moments, default_tokens, second_moments
from .graph import build_graph
from .passes import optimise
from .passes.dequantize import DequantizeWeights
from .passes.precision import TYPES, SetPrecision
from .passes.quantize import Quantize
from .precision import Precision, Rounding
from .progress import Progress, silent

#: Share of the parameters from which on the embedding takes part in rounding to 4 bits. A step reads one
#: row of it, so a smaller one costs no time and little space at 8 bits, and its rounding is felt.
EMBEDDING_SHARE = 0.25
#: Dialects that have weights in blocks of integers: ONNX Runtime's nodes, or DequantizeLinear.
INTEGERS = ("ort", "primitive")


def step_graph(
    model: DijiangModel,
    dialect: str,
    precision: Precision,
    calibration_tokens: int | None = None,
    progress: Progress = silent,
) -> ir.Model:
    """The graph of a checkpoint; its weights are computed when it is saved."""
    fused = DIALECTS[dialect].fused
    graph = optimise(build_graph(model, dialect), skip_norms=fused and precision.type == "fp32")
    types = precision.type
    if precision.body is not None and dialect == "primitive":
        DequantizeWeights(f"int{precision.body.bits}")(graph)
        types = "fp16"
    elif precision.quantized:
        precision = _with_embedding(precision, model)
        Quantize(precision, _moments(model, dialect, precision, calibration_tokens, progress))(graph)
    if types in TYPES:
        SetPrecision(types, fused_norms=fused)(graph)
    return graph


def _with_embedding(precision: Precision, model: DijiangModel) -> Precision:
    embed = precision.embed
    rows, width = model.weights.shape("embed.weight")
    if embed is None or rows * width >= EMBEDDING_SHARE * model.parameters:
        return precision
    return replace(precision, embed=Rounding(8, embed.block))


def _moments(
    model: DijiangModel, dialect: str, precision: Precision, tokens: int | None, progress: Progress
) -> Moments:
    if precision.body is None or precision.body.bits > 4:
        return {}
    tokens = default_tokens(model.parameters) if tokens is None else tokens
    if not tokens:
        return {}
    graph = optimise(build_graph(model, dialect), skip_norms=False)
    return second_moments(graph, tokens, model.positions_limit, model.spec.vocab_size, progress)
