"""The order in which weights are written, and lie in the file."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from ..roles import role_of
from .linear import shape_of


class OrderInitializers(InPlacePass):
    """The model's matrices in the order of their last use, then vectors, then what no model has.

    Codes and scales of one weight are then written one after the other, and the bias that a norm is
    folded into after its weight: the weight is read once and kept for no longer, and nobody who writes
    a bias has to wait for it. The head comes last, tied or not, as calibration comes to it.
    """

    def call(self, model: ir.Model) -> PassResult:
        known, ordered = model.graph.initializers, _by_use(model.graph)
        modified = list(known.values()) != ordered
        for value in ordered:
            del known[str(value.name)]
            known.add(value)
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        if list(model.graph.initializers.values()) != _by_use(model.graph):
            raise PostconditionError("initializers are not in the order of their use")


def _by_use(graph: ir.Graph) -> list[ir.Value]:
    known = graph.initializers.values()
    reads = [v for node in graph for v in node.inputs if v is not None and v.is_initializer()]
    used = reversed(dict.fromkeys(reversed(reads)))

    def rank(value: ir.Value) -> int:
        return 1 if len(shape_of(value)) < 2 else 0 if role_of(value) else 2

    return sorted(dict.fromkeys([*used, *known]), key=rank)
