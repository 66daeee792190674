"""A bundle's graphs against its manifest: what `open_bundle` asks before anything reads or runs one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import BundleError
from ..models.spec import ModelSpec
from ..reading import read_regular
from ..recipe import GRAPHS, SCHEMES
from . import names
from .manifest import AGAIN, DATA, Manifest
from .wire import OnnxGraph, Value, read_onnx

#: Element types by ONNX's numbers.
FLOAT, INT64 = 1, 7
#: An input that a graph for ragged steps has, but in bundles of before.
STARTS = Value(names.SEQUENCE_STARTS, INT64, (None,))
#: onnxruntime takes a file for another format by the end of its name.
SUFFIX = ".onnx"
#: Makes the next tokens of the logits: so they are ids of the vocabulary.
ARGMAX = ("", "ArgMax")
#: Where a stored tensor lies in the data file: ONNX's words.
LOCATION, NUMBERS = "location", ("offset", "length")
#: Names, and letters of each, that a message shows.
SHOWN, LETTERS = 3, 60


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """BundleError unless every graph has the nodes of its form only, and fits data file and manifest."""
    for name, record in manifest.graphs.items():
        file = folder / record.file
        try:
            if file.suffix != SUFFIX:
                raise ValueError(f"its name does not end in {SUFFIX}")
            check_graph(read_onnx(read_regular(file)), name, manifest)
        except (OSError, ValueError) as error:
            raise BundleError(f"{file}: not a graph of dijiang ({error}); do not use it: {AGAIN}") from error


def check_graph(graph: OnnxGraph, name: str, manifest: Manifest) -> None:
    """ValueError unless a graph is one of the form `name`, for a manifest."""
    allowed = GRAPHS[name].nodes | SCHEMES[manifest.recipe.scheme].nodes
    if foreign := sorted({node.kind for node in graph.nodes} - allowed):
        found = _shown(kind if not domain else f"{domain}.{kind}" for domain, kind in foreign)
        raise ValueError(f"node {found}, expected those of the {name} graph only")
    for places in graph.external:
        _check_place(places, manifest.files[DATA].bytes)
    spec = manifest.spec
    inputs = [value for value in graph.inputs if not (value == STARTS and GRAPHS[name].ragged)]
    _check_values("input", inputs, inputs_of(spec), spec.num_layers)
    _check_values("output", graph.outputs, outputs_of(spec), spec.num_layers)
    makers = [(node.kind, node.inputs) for node in graph.nodes if names.NEXT_TOKENS in node.outputs]
    if makers != [(ARGMAX, (names.LOGITS,))]:
        raise ValueError(f"{names.NEXT_TOKENS} is not the {ARGMAX[1]} of {names.LOGITS}")


def inputs_of(spec: ModelSpec) -> Iterator[Value]:
    """The inputs of every step graph; the sizes of a step are open."""
    yield from (Value(name, INT64, (None, None)) for name in names.INPUTS)
    yield from _states(spec, names.past_state)


def outputs_of(spec: ModelSpec) -> Iterator[Value]:
    """The outputs of a step graph."""
    yield Value(names.LOGITS, FLOAT, (None, None, spec.vocab_size))
    yield Value(names.NEXT_TOKENS, INT64, (None, None))
    yield from _states(spec, names.present_state)


def _states(spec: ModelSpec, name: Callable[[int], str]) -> Iterator[Value]:
    return (Value(name(layer), FLOAT, (None, *spec.state_shape)) for layer in range(spec.num_layers))


def _check_values(what: str, found: Sequence[Value], expected: Iterator[Value], layers: int) -> None:
    """ValueError unless inputs or outputs are those expected, in any order."""
    left = {value.name: value for value in found}
    if len(left) != len(found):
        raise ValueError(f"two {what}s of one name")
    for value in expected:  # ends at the first that is not there: layers are whatever a manifest says
        if (here := left.pop(value.name, None)) is None:
            others = f", found {_shown(left)}" if left else ""
            raise ValueError(f"no {what} {value.name}{others}; the manifest says {layers} layers")
        if here != value:
            raise ValueError(f"{what} {_described(here)}, expected {_described(value)}")
    if left:
        raise ValueError(f"{what} {_shown(left)} is not expected; the manifest says {layers} layers")


def _check_place(places: tuple[tuple[str, str], ...], size: int) -> None:
    """ValueError unless a stored tensor lies in the bundle's data file of `size` bytes."""
    place = dict(places)
    if len(place) != len(places) or place.keys() - {LOCATION, *NUMBERS}:
        raise ValueError(f"weights with {_shown(key for key, _ in places)}, expected {LOCATION}, offset, length")
    if place.get(LOCATION) != DATA:
        raise ValueError(f"weights in {_shown([place.get(LOCATION, '')])!r}, expected {DATA!r}")
    numbers = [place.get(name, "0") for name in NUMBERS]
    # Longer than 20 digits is no size, and takes long to read.
    if not all(n.isascii() and n.isdecimal() and len(n) <= 20 for n in numbers) or sum(map(int, numbers)) > size:
        raise ValueError(f"weights at {_shown(numbers)}, expected a place in the {size:,} bytes of {DATA}")


def _described(value: Value) -> str:
    types = {FLOAT: "float32", INT64: "int64"}
    shape = ", ".join("*" if size is None else str(size) for size in value.shape[:8])
    return f"{value.name} {types.get(value.type or 0, f'of type {value.type}')} [{shape}]"


def _shown(found: Iterable[str]) -> str:
    """The first of some names of a stranger, cut."""
    listed = list(found)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(name[:LETTERS] for name in listed[:SHOWN]) + more
