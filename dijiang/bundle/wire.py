"""What an ONNX file says, without the onnx package: it is not part of the runtime, and it loads anything.

The file is a protocol buffer: fields of a number, a kind and a value, in each other. The tables below are the
messages of a step graph with the fields that dijiang writes. Whatever they do not have is refused. So nothing is
nested deeper than the tables, and nothing that another reader would see is left unseen.

Sources: https://protobuf.dev/programming-guides/encoding and onnx.proto of ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

#: Kinds of a value: a number of 7 bits a byte; 8 bytes; a length and as many bytes; 4 bytes.
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
#: Of all messages of a file together: so reading one ends within a second. A graph of 32 layers has 22,000 at most.
MOST_FIELDS = 300_000
MOST_NUMBER = 1 << 64


@dataclass(frozen=True)
class Field:
    """A field of a message.

    many: it may come more than once.  message: what its bytes are; None: a string or packed numbers.
    """

    name: str
    kinds: tuple[int, ...] = (BYTES,)
    many: bool = False
    message: Message | None = None


class Message:
    """A table of fields. fields: number and kind, as a file has them in one number -> field."""

    def __init__(self, title: str, fields: dict[int, Field]) -> None:
        self.title = title
        self.fields = {number << 3 | kind: field for number, field in fields.items() for kind in field.kinds}


def _number(name: str) -> Field:
    return Field(name, (VARINT,))


def _numbers(name: str, kind: int = VARINT) -> Field:
    """Numbers one by one, or packed."""
    return Field(name, (kind, BYTES), many=True)


def _texts(name: str) -> Field:
    return Field(name, many=True)


def _each(name: str, message: Message) -> Field:
    return Field(name, many=True, message=message)


NOTES = _texts("metadata_props")
PAIR = Message("a place of data", {1: Field("key"), 2: Field("value")})
TENSOR = Message(
    "a stored tensor",
    {
        1: _numbers("dims"),
        2: _number("data_type"),
        4: _numbers("float_data", FOUR),
        5: _numbers("int32_data"),
        7: _numbers("int64_data"),
        8: Field("name"),
        9: Field("raw_data"),
        13: _each("external_data", PAIR),
        14: _number("data_location"),
        16: NOTES,
    },
)
ATTRIBUTE = Message(
    "an attribute",
    {
        1: Field("name"),
        2: Field("f", (FOUR,)),
        3: _number("i"),
        4: Field("s"),
        7: _numbers("floats", FOUR),
        8: _numbers("ints"),
        9: _texts("strings"),
        20: _number("type"),
    },
)
NODE = Message(
    "a node",
    {
        1: _texts("input"),
        2: _texts("output"),
        3: Field("name"),
        4: Field("op_type"),
        5: _each("attribute", ATTRIBUTE),
        7: Field("domain"),
        9: NOTES,
    },
)
DIMENSION = Message("a dimension", {1: _number("dim_value"), 2: Field("dim_param")})
SHAPE = Message("a shape", {1: _each("dim", DIMENSION)})
TENSOR_TYPE = Message("a tensor's type", {1: _number("elem_type"), 2: Field("shape", message=SHAPE)})
TYPE = Message("a type", {1: Field("tensor_type", message=TENSOR_TYPE)})
VALUE = Message("an input or output", {1: Field("name"), 2: Field("type", message=TYPE), 4: NOTES})
GRAPH = Message(
    "the graph",
    {
        1: _each("node", NODE),
        2: Field("name"),
        5: _each("initializer", TENSOR),
        11: _each("input", VALUE),
        12: _each("output", VALUE),
        13: _texts("value_info"),
        16: NOTES,
    },
)
MODEL = Message(
    "the model",
    {
        1: _number("ir_version"),
        2: Field("producer_name"),
        3: Field("producer_version"),
        4: Field("domain"),
        5: _number("model_version"),
        7: Field("graph", message=GRAPH),
        8: _texts("opset_import"),
        14: NOTES,
    },
)
#: Fields that are refused -> what they are, for the message.
FOREIGN = {
    (ATTRIBUTE.title, 5): "a tensor of its own",
    (ATTRIBUTE.title, 6): "a subgraph (of a Loop, If or Scan)",
    (ATTRIBUTE.title, 11): "subgraphs",
    (GRAPH.title, 15): "a sparse tensor",
    (MODEL.title, 20): "a training graph",
    (MODEL.title, 25): "a function",
}


@dataclass(frozen=True)
class Node:
    """One node: domain and type, and the names that it reads and writes."""

    kind: tuple[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """An input or output: its element type by ONNX's number, its sizes; None: a size that is open."""

    name: str
    type: int | None
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class OnnxGraph:
    """What is checked of a graph. external: where stored tensors lie, by key as ONNX calls them."""

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    external: tuple[tuple[tuple[str, str], ...], ...]


def read_onnx(data: bytes) -> OnnxGraph:
    """The graph in a file's bytes.

    Raises:
        ValueError: no such file, or one with anything that dijiang does not write.
    """
    model = _Reader(data).message(MODEL, 0, len(data))
    graph = model.get("graph")
    if graph is None:
        raise ValueError("no graph in it")
    return OnnxGraph(
        nodes=tuple(
            Node((_text(n.get("domain")), _text(n.get("op_type"))), _all(n.get("input")), _all(n.get("output")))
            for n in graph.get("node", ())
        ),
        inputs=tuple(map(_value, graph.get("input", ()))),
        outputs=tuple(map(_value, graph.get("output", ()))),
        external=tuple(
            tuple((_text(pair.get("key")), _text(pair.get("value"))) for pair in tensor["external_data"])
            for tensor in graph.get("initializer", ())
            if "external_data" in tensor
        ),
    )


def _value(found: dict[str, Any]) -> Value:
    tensor = found.get("type", {}).get("tensor_type", {})
    sizes = []
    for dim in tensor.get("shape", {}).get("dim", ()):
        if len(dim) > 1:
            raise ValueError("a dimension that has a number and a name")
        sizes.append(dim.get("dim_value"))
    return Value(_text(found.get("name")), tensor.get("elem_type"), tuple(sizes))


def _all(found: Iterable[bytes] | None) -> tuple[str, ...]:
    return tuple(map(_text, found or ()))


def _text(found: bytes | None) -> str:
    """ValueError if it is no UTF-8."""
    return (found or b"").decode()


class _Reader:
    """Reads messages of one file by their tables."""

    def __init__(self, data: bytes) -> None:
        self._data, self._left = data, MOST_FIELDS

    def message(self, table: Message, at: int, end: int) -> dict[str, Any]:
        """The fields between two offsets, by name; a list of those that may come more than once."""
        found: dict[str, Any] = {}
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {MOST_FIELDS:,} fields")
            key, at = self._varint(at, end)
            field = table.fields.get(key)
            if field is None:
                what = FOREIGN.get((table.title, key >> 3), f"field {key >> 3} of kind {key & 7}")
                raise ValueError(f"{table.title} has {what}")
            value: Any
            if key & 7 == VARINT:
                value, at = self._varint(at, end)
            else:
                size, at = (8 >> (key & 7 == FOUR), at) if key & 7 != BYTES else self._varint(at, end)
                start, at = at, at + size
                if at > end:
                    raise ValueError(f"{table.title} is cut")
                value = self._data[start:at] if field.message is None else self.message(field.message, start, at)
            if field.many:
                found.setdefault(field.name, []).append(value)
            elif field.name in found:
                raise ValueError(f"{table.title} has two of {field.name}")
            else:
                found[field.name] = value
        return found

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """A number, and where it ends."""
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= MOST_NUMBER:
                    break
                return value, at
            shift += 7
        raise ValueError("a number in it is cut, or too long")
