"""Where a graph is cut into parts that can be run one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ..graph.passes.linear import shape_of
from ..graph.passes.types import LOW
from ..graph.roles import layer_of
from ..runtime.sessions.inference import import_onnxruntime

#: Bytes of weights from which a graph runs in parts, and of a part at most, unless one layer has more.
PART_BYTES = 1_500_000_000
#: The first onnxruntime that finds the data of a graph which has no file of its own.
PARTS_FROM = (1, 21)
#: Nodes that multiply by a weight. Onnxruntime fuses none of them with the node before, so that a cut
#: there leaves its arithmetic as it is.
PRODUCTS = frozenset({"MatMul", "MatMulNBits"})


@dataclass(frozen=True)
class Part:
    """Consecutive nodes, by the values that cross their edges.

    inputs: of the graph and of parts before.  last: inputs that no later part reads.
    outputs: of the graph, and what later parts read.
    nbytes: of the weights, in a session.  stored: of the weights, in a file.
    """

    inputs: list[ir.Value]
    last: list[ir.Value]
    outputs: list[ir.Value]
    nbytes: int
    stored: int


def bound_here() -> float:
    """Bytes of a part; no end where the installed onnxruntime takes a graph in a file only."""
    version = import_onnxruntime().__version__.split(".")[:2]
    return PART_BYTES if tuple(map(int, version)) >= PARTS_FROM else math.inf


def parts(graph: ir.Graph, bound: float | None = None) -> list[Part]:
    """The parts of a graph, each of whole layers with weights of `bound` bytes, or of one layer.

    bound: None: as suits the installed onnxruntime.
    """
    bound = bound_here() if bound is None else bound
    constants = _constants(graph)
    groups: list[_Nodes] = []
    for unit in _units(graph, constants):
        if groups and _bytes(groups[-1].weights | unit.weights) <= bound:
            groups[-1].nodes.extend(unit.nodes)
            groups[-1].weights.update(unit.weights)
        else:
            groups.append(unit)
    result: list[Part] = []
    later: set[ir.Value] = set()
    for group in reversed(groups):
        made = dict.fromkeys(value for node in group.nodes for value in node.outputs)
        read = dict.fromkeys(v for node in group.nodes for v in node.inputs if v is not None)
        inputs = [v for v in read if v not in made and v not in constants]
        outputs = [v for v in made if v in later or v.is_graph_output()]
        last = [v for v in inputs if v not in later]
        stored = sum(v.const_value.nbytes for v in group.weights)
        result.insert(0, Part(inputs, last, outputs, _bytes(group.weights), stored))
        later.update(inputs)
    return result


@dataclass
class _Nodes:
    """Consecutive nodes and the initializers that they read."""

    nodes: list[ir.Node]
    weights: set[ir.Value]


def _units(graph: ir.Graph, constants: dict[ir.Value, set[ir.Value]]) -> Iterator[_Nodes]:
    """Nodes that stay together: each run ends where the first product of another layer comes."""
    unit, name = _Nodes([], set()), ""
    for node in graph:
        if all(value in constants for value in node.outputs):
            continue  # belongs to whoever reads it
        weights = set().union(*(constants[v] for v in node.inputs if v in constants))
        group = _group(weights) if node.op_type in PRODUCTS else ""
        if group and group != name:
            yield unit
            unit, name = _Nodes([], set()), group
        unit.nodes.append(node)
        unit.weights.update(weights)
    yield unit


def _constants(graph: ir.Graph) -> dict[ir.Value, set[ir.Value]]:
    """Values that depend on no input -> the initializers that they are made from."""
    found = {value: {value} for value in graph.initializers.values()}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if all(value in found for value in inputs):
            made = set().union(*(found[value] for value in inputs))
            found.update(dict.fromkeys(node.outputs, made))
    return found


def _group(weights: set[ir.Value]) -> str:
    """The layer, or the role outside of the layers, that weights belong to; "": none is marked."""
    found = (layer_of(value) for value in weights if len(shape_of(value)) > 1)
    return next((layer for layer in found if layer), "")


def _bytes(weights: set[ir.Value]) -> int:
    """What initializers are in a session on the CPU, where 16-bit floats and what nodes unpack are float32."""
    return sum(4 * v.const_value.size if _widens(v) else v.const_value.nbytes for v in weights)


def _widens(value: ir.Value) -> bool:
    return value.dtype in LOW or any(use.node.op_type == "DequantizeLinear" for use in value.uses())
