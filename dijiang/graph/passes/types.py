"""fp16 and bf16: weights and activations in the type, everything that accumulates in float32.

The recurrence and its state, the feature map, norms' statistics, rotary angles and whatever else is
listed in FLOAT_NODES stay float32. What lies between follows what it is given and what it is used for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from ...errors import ExportError
from ..roles import ROUNDED, Role, role_of
from .linear import array_of, drop_unused_initializers, shape_of, stored, value_of

FLOAT = ir.DataType.FLOAT
#: Precision -> type of its weights and activations.
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LOW = frozenset(TYPES.values())
#: Nodes whose result would lose its meaning in 8 or 11 bits, or whose inputs may overflow 16.
FLOAT_NODES = frozenset(
    (
        *(
            "LinearAttention",
            "Softmax",
            "RotaryEmbedding",
            "CumSum",
            "Exp",
            "Erf",
            "Tanh",
            "Sigmoid",
            "Sqrt",
            "Pow",
        ),
        *("Reciprocal", "ReduceSum", "ReduceMean", "ArgMax"),  # CUDA has ArgMax, but not in bfloat16
    )
)
#: One node with statistics in float32 inside, in ONNX Runtime; TensorRT takes the type as it stands.
NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
#: Nodes that compute: these go to float32 if that is all they are used for. Others only move data.
ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
#: Nodes whose outputs are integers or booleans, whatever they are given.
UNTYPED = frozenset({"Shape", "ArgMax", "Less", "Greater", "Equal", "Range"})
#: Our nodes for a GPU -> the place of their one input in the type, and of the bias that they add to it. Their
#: first output is in the type, too; all else is float32.
MIXED = {"RecurrentStep": (0, 10), "AddNorm": (1, 4)}
#: Nodes with weights of their own: in the type.
PROJECTIONS = frozenset({"MatMul", "Gemm", "MatMulNBits"})


class SetPrecision(InPlacePass):
    """Give weights and activations a 16-bit type.

    fused_norms: norms compute their statistics in float32 whatever they are given (ONNX Runtime).
    """

    def __init__(self, precision: str, *, fused_norms: bool) -> None:
        super().__init__()
        self.dtype = TYPES[precision]
        self._kept = FLOAT_NODES if fused_norms else FLOAT_NODES | NORMS

    def requires(self, model: ir.Model) -> None:
        found = [v.name for v in model.graph.initializers.values() if v.dtype in LOW]
        if found:
            raise PreconditionError(f"weights have a 16-bit type already: {found}")

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        nodes = [node for node in graph if node.domain != "ai.onnx.ml"]
        floats = _float_values(graph, nodes)
        wants = self._wants(graph, nodes)
        low: set[ir.Value] = set()
        self._copies: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            lowered = self._is_low(node, floats, low, wants)
            given, bias = MIXED.get(node.op_type, (None, None))
            for index, value in enumerate(node.inputs):
                if value is None or value not in floats:
                    continue
                asked = lowered if given is None else index == given
                if index == bias and _is_plain(node.inputs[given]):
                    node.replace_input_with(index, self._rounded(graph, value, node))
                elif (value in low) != asked:
                    node.replace_input_with(index, self._copy(graph, value, node, asked))
            if lowered:
                low.update(output for output in typed_outputs(node) if output in floats)
        self._restore_outputs(graph, low)
        drop_unused_initializers(graph)
        graph.sort()
        return PassResult(model, modified=bool(low))

    def ensures(self, model: ir.Model) -> None:
        wrong = [v.name for v in model.graph.outputs if v.dtype in (self.dtype, None)]
        if wrong:
            raise PostconditionError(f"graph outputs are not float32: {wrong}")

    def _wants(self, graph: ir.Graph, nodes: list[ir.Node]) -> dict[ir.Node, bool | None]:
        """Whether all uses of a node are in the type (True), all in float32 (False), or both (None)."""
        wants: dict[ir.Node, bool | None] = {}
        outputs = set(graph.outputs)
        for node in reversed(nodes):
            uses = [use for output in typed_outputs(node) for use in output.uses()]
            found = {self._wanted(use.node, use.idx, wants) for use in uses}
            if outputs.intersection(node.outputs):
                found.add(False)
            wants[node] = found.pop() if len(found) == 1 else None
        return wants

    def _wanted(self, node: ir.Node, index: int, wants: dict[ir.Node, bool | None]) -> bool | None:
        """The same of one use: an input of a node."""
        if node.op_type in MIXED:
            return index == MIXED[node.op_type][0]
        fixed = self._fixed(node)
        return wants[node] if fixed is None else fixed

    def _fixed(self, node: ir.Node) -> bool | None:
        """True: a node always in the type; False: always float32; None: it depends."""
        if node.op_type in MIXED:
            return True
        if node.op_type in self._kept:
            return False
        if node.op_type == "Gather":
            return True if role_of(node.inputs[0]) is Role.EMBEDDING else None
        if node.op_type in ("GatherBlockQuantized", "DequantizeLinear"):
            return True
        if node.op_type not in PROJECTIONS:
            return None
        return role_of(node.inputs[1]) in ROUNDED

    def _is_low(
        self, node: ir.Node, floats: set[ir.Value], low: set[ir.Value], wants: dict[ir.Node, bool | None]
    ) -> bool:
        fixed = self._fixed(node)
        if fixed is not None:
            return fixed
        given = {value in low for value in _activations(node) if value in floats}
        if not given or given == {False}:
            return False
        if given == {True}:
            return not (node.op_type in ARITHMETIC and wants[node] is False)
        # Both kinds meet, as in residual + position: in the type, unless float32 is wanted or a norm
        # divides.
        return node.op_type != "Div" and wants[node] is not False

    def _copy(self, graph: ir.Graph, value: ir.Value, node: ir.Node, lowered: bool) -> ir.Value:
        """The value in the other type; made once."""
        if value in self._copies:
            return self._copies[value]
        if value.is_initializer():
            made = self._stored(graph, value)
        else:
            cast = ir.node("Cast", [value], {"to": self.dtype if lowered else FLOAT})
            producer = value.producer()
            if producer is None:
                graph.insert_before(graph[0], [cast])
            else:
                graph.insert_after(producer, [cast])
            made = cast.outputs[0]
        self._copies[value] = made
        return made

    def _rounded(self, graph: ir.Graph, value: ir.Value, node: ir.Node) -> ir.Value:
        """A stored float32 value by way of the type, so that graphs share its bytes. ONNX Runtime casts it once."""
        cast = ir.node("Cast", [self._stored(graph, value)], {"to": FLOAT})
        graph.insert_before(node, [cast])
        return cast.outputs[0]

    def _stored(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        def rounded() -> np.ndarray:
            source = array_of(value)
            with np.errstate(over="ignore"):
                data = source.astype(self.dtype.numpy())
            if not np.isfinite(data.astype(np.float32)).all():
                raise ExportError(
                    f"{value.name}: a number of {np.abs(source).max():.3g} is beyond {self.dtype.name}; "
                    "export with --precision bf16 or fp32"
                )
            return data

        name = f"{value.name}.{self.dtype.name.lower()}"
        return stored(graph, name, shape_of(value), rounded, self.dtype, like=value)

    def _restore_outputs(self, graph: ir.Graph, low: set[ir.Value]) -> None:
        """Graph outputs keep their name and float32."""
        for index, output in enumerate(list(graph.outputs)):
            if output not in low:
                continue
            name, output.name = output.name, f"{output.name}.low"
            result = self._copies.get(output)
            if result is None:
                cast = ir.node("Cast", [output], {"to": FLOAT})
                graph.append(cast)
                result = cast.outputs[0]
            result.name, result.type, result.shape = name, ir.TensorType(FLOAT), output.shape
            output.type = ir.TensorType(self.dtype)
            graph.outputs[index] = result


def _is_plain(value: ir.Value | None) -> bool:
    """Whether a projection comes from weights in the type: so does its bias. Those in blocks have it in float32."""
    producer = value_of(value).producer()
    return producer is not None and producer.op_type == "MatMul"


def typed_outputs(node: ir.Node) -> Sequence[ir.Value]:
    """Outputs in the type, of a node that is."""
    return node.outputs[:1] if node.op_type in MIXED else node.outputs


def _activations(node: ir.Node) -> Iterable[ir.Value]:
    """Inputs that are computed: a stored weight takes the type of its node."""
    return (v for v in node.inputs if v is not None and not v.is_initializer())


def _float_values(graph: ir.Graph, nodes: list[ir.Node]) -> set[ir.Value]:
    """Every float32 value of a graph that has no other floating-point type yet."""
    found = {v for v in (*graph.inputs, *graph.initializers.values()) if v.dtype == FLOAT}
    for node in nodes:
        if node.op_type == "Cast":
            is_float = node.attributes["to"].as_int() == FLOAT
        elif node.op_type in ("Gather", "GatherND", "Split", "Reshape", "Unsqueeze", "Squeeze"):
            is_float = node.inputs[0] in found
        else:
            is_float = node.op_type not in UNTYPED and any(v in found for v in node.inputs)
        if is_float:
            found.update(node.outputs)
    return found
