"""What the passes share that replace a pattern of nodes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from .linear import Linear, drop_unused_initializers


class Rewrite(InPlacePass):
    """Replaces all matches, round after round, until there are none.

    left: what a match is, for the error where one is left.
    """

    left: ClassVar[str]

    @abstractmethod
    def matches(self, graph: ir.Graph) -> Iterable[tuple[Any, ...]]:
        """Where the pattern is, in the order of the graph."""

    @abstractmethod
    def rewrite(self, graph: ir.Graph, *match: Any) -> None:
        """Replace one match, so that it is none any more."""

    def call(self, model: ir.Model) -> PassResult:
        graph, changed = model.graph, False
        while found := list(self.matches(graph)):
            for match in found:
                # One before it in the round may have replaced its nodes: the next round sees what is left.
                if all(node.graph is graph for node in _nodes(match)):
                    self.rewrite(graph, *match)
            changed = True
        drop_unused_initializers(graph)
        return PassResult(model, modified=changed)

    def ensures(self, model: ir.Model) -> None:
        if any(self.matches(model.graph)):
            raise PostconditionError(f"{self.left} are left")


def _nodes(match: Iterable[Any]) -> Iterator[ir.Node]:
    """The nodes of a match: of nodes, linears and lists of them."""
    for part in match:
        if isinstance(part, ir.Node):
            yield part
        else:
            yield from part.nodes if isinstance(part, Linear) else _nodes(part)
