"""What the passes share that replace a pattern of nodes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from .linear import drop_unused_initializers


class Rewrite(InPlacePass):
    """Replaces one match after the other until there is none.

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
        while match := next(iter(self.matches(graph)), None):
            self.rewrite(graph, *match)
            changed = True
        drop_unused_initializers(graph)
        return PassResult(model, modified=changed)

    def ensures(self, model: ir.Model) -> None:
        if any(self.matches(model.graph)):
            raise PostconditionError(f"{self.left} are left")
