"""Graph passes: each small, each with what it promises checked after it ran."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassManager
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from .fold import FoldNorms
from .gpu import CentreNorms
from .merge import DropRejoined, FlattenSplits, MergeOutputs, MergeProjections
from .residual import FuseBiases, FuseResidualNorms


def optimise(model: ir.Model, *, skip_norms: bool, operators: str = "", centred: bool = False) -> ir.Model:
    """Fewer and larger nodes, the same function; `model` is changed in place.

    skip_norms: one node for a residual sum and the norm that reads it.
    operators: that node is ours, of this domain, not ONNX Runtime's; where it is one for GPUs, it adds biases, too.
    centred: norms subtract the mean in nodes of their own.

    Norm weights go into the projections after them, which makes the two norms of a parallel residual
    one; then projections of one input, and those of one sum, become one matmul each.
    """
    steps: list[InPlacePass] = [
        FoldNorms(),
        CommonSubexpressionEliminationPass(),
        MergeProjections(),
        FlattenSplits(),
        MergeOutputs(),
        DropRejoined(),
    ]
    if centred:
        steps.append(CentreNorms())
    if skip_norms:
        steps.append(FuseResidualNorms(operators=operators))
    if operators:
        steps.append(FuseBiases())
    return PassManager(steps)(model).model
