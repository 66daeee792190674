"""Fewer and larger matmuls: projections of one input side by side, projections of one sum on top."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from .linear import Linear, array_of, integers, linear_to, linears, stored, value_of
from .rewrite import Rewrite


class MergeProjections(Rewrite):
    """Linears over the same input become one, followed by a Split.

    With the parallel residual that is q, k, v, gate and MLP-up in one matmul; with the sequential
    one q, k, v and gate.
    """

    left = "linears over one input"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[Linear, ...]]:
        """The linears of one input, where there are several."""
        groups: dict[ir.Value, list[Linear]] = defaultdict(list)
        for linear in linears(graph):
            groups[linear.input].append(linear)
        yield from (tuple(group) for group in groups.values() if len(group) > 1)

    def rewrite(self, graph: ir.Graph, *group: Linear) -> None:
        """Their weights side by side."""
        rows, widths = group[0].shape[0], [linear.shape[1] for linear in group]
        name = "+".join(str(linear.weight.name) for linear in group)
        weights = [linear.weight for linear in group]
        shape = (rows, sum(widths))
        weight = stored(
            graph, name, shape, lambda: np.concatenate([*map(array_of, weights)], axis=1), like=weights[0]
        )
        new = [ir.node("MatMul", [group[0].input, weight])]
        if any(linear.bias is not None for linear in group):
            biases = [linear.bias for linear in group]
            bias = stored(graph, f"{name}.bias", (sum(widths),), lambda: _joined(biases, widths))
            new.append(ir.node("Add", [new[0].outputs[0], bias]))
        split = [new[-1].outputs[0], integers(graph, widths)]
        new.append(ir.node("Split", split, {"axis": -1}, num_outputs=len(widths)))
        old = [node for linear in group for node in linear.nodes]
        replace_nodes_and_values(
            graph, old[0], old, new, [linear.output for linear in group], list(new[-1].outputs)
        )


def _joined(biases: list[ir.Value | None], widths: list[int]) -> np.ndarray:
    return np.concatenate([np.zeros(w) if b is None else array_of(b) for b, w in zip(biases, widths, strict=True)])


class FlattenSplits(Rewrite):
    """A Split of a Split is one Split: each copies what it splits."""

    left = "nested splits"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
        """(outer, inner): an inner Split of an output of an outer one, both of the last axis."""
        for inner in list(graph):
            source = inner.inputs[0] if inner.op_type == "Split" else None
            outer = None if source is None else source.producer()
            if (
                outer is not None
                and outer.op_type == "Split"
                and all(node.attributes["axis"].as_int() == -1 for node in (outer, inner))
                and len(value_of(source).uses()) == 1
            ):
                yield outer, inner

    def rewrite(self, graph: ir.Graph, outer: ir.Node, inner: ir.Node) -> None:
        """The outer one with the parts of the inner one in their place."""
        at = list(outer.outputs).index(value_of(inner.inputs[0]))
        sizes = [array_of(value_of(node.inputs[1])).tolist() for node in (outer, inner)]
        widths = [*sizes[0][:at], *sizes[1], *sizes[0][at + 1 :]]
        split = [outer.inputs[0], integers(graph, widths)]
        new = ir.node("Split", split, {"axis": -1}, num_outputs=len(widths))
        old = [*outer.outputs[:at], *inner.outputs, *outer.outputs[at + 1 :]]
        replace_nodes_and_values(graph, outer, [inner, outer], [new], old, list(new.outputs))


class MergeOutputs(Rewrite):
    """(x + a A) + m M becomes x + [a m] [A; M]: attention-out and MLP-down of a parallel residual."""

    left = "sums of two linears"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, Linear, Linear]]:
        """(inner Add, outer Add, first, second) of (x + first) + second, both linears used only there."""
        for outer in list(graph):
            if outer.op_type != "Add" or outer.inputs[1] is None or outer.inputs[1].is_initializer():
                continue
            inner = value_of(outer.inputs[0]).producer()
            if inner is None or inner.op_type != "Add" or len(inner.outputs[0].uses()) != 1:
                continue
            first, second = linear_to(inner.inputs[1]), linear_to(outer.inputs[1])
            if first is not None and second is not None:
                yield inner, outer, first, second

    def rewrite(self, graph: ir.Graph, inner: ir.Node, outer: ir.Node, first: Linear, second: Linear) -> None:
        """Their inputs side by side, their weights on top of each other."""
        pair = (first, second)
        name = "+".join(str(linear.weight.name) for linear in pair)
        shape = (first.shape[0] + second.shape[0], first.shape[1])
        weights = [linear.weight for linear in pair]
        weight = stored(graph, name, shape, lambda: np.concatenate([*map(array_of, weights)]), like=first.weight)
        joined = ir.node("Concat", [linear.input for linear in pair], {"axis": -1})
        new = [joined, ir.node("MatMul", [joined.outputs[0], weight])]
        biases = [linear.bias for linear in pair if linear.bias is not None]
        if biases:
            bias = stored(graph, f"{name}.bias", shape[1:], lambda: np.sum([array_of(b) for b in biases], axis=0))
            new.append(ir.node("Add", [new[-1].outputs[0], bias]))
        new.append(ir.node("Add", [inner.inputs[0], new[-1].outputs[0]]))
        old = [*first.nodes, inner, *second.nodes, outer]
        replace_nodes_and_values(graph, outer, old, new, [outer.outputs[0]], [new[-1].outputs[0]])


class DropRejoined(Rewrite):
    """Concat(Split(x)) is x."""

    left = "Concats of all parts of a Split"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
        """(Split, Concat) where the Concat puts all parts of the Split together again, in their order."""
        for joined in list(graph):
            split = value_of(joined.inputs[0]).producer() if joined.op_type == "Concat" else None
            if (
                split is not None
                and split.op_type == "Split"
                and list(split.outputs) == list(joined.inputs)
                and all(node.attributes["axis"].as_int() == -1 for node in (split, joined))
            ):
                yield split, joined

    def rewrite(self, graph: ir.Graph, split: ir.Node, joined: ir.Node) -> None:
        """What was split takes the place of what was joined."""
        joined.outputs[0].replace_all_uses_with(value_of(split.inputs[0]))
        graph.remove(joined, safe=True)
        if not any(output.uses() for output in split.outputs):
            graph.remove(split, safe=True)
