"""A bundle's graph in a folder of its own, with the inputs and outputs that another runtime feeds and reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx

from .. import Bundle, ExportError
from ..recipe import GRAPHS


def standalone(bundle: Bundle) -> list[str]:
    """The graphs of a bundle that need no compiled operator, the best first; ExportError if there is none."""
    found = [name for name in bundle.manifest.graphs if not GRAPHS[name].operators]
    if not found:
        raise ExportError(f"{bundle.path}: every graph needs the compiled operator; export again without --graph")
    return found


def write_graph(bundle: Bundle, name: str, file: Path, adapt: Callable[[onnx.GraphProto], None]) -> None:
    """Write one of a bundle's graphs after `adapt`; the weights beside it are linked where the disk can do that."""
    model = onnx.load(bundle.graph_file(name), load_external_data=False)
    adapt(model.graph)
    onnx.save(model, file)
    for data in (data for data in bundle.manifest.files if data.endswith(".data")):
        link_or_copy(bundle.path / data, file.parent / data)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk cannot do that."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def change(
    graph: onnx.GraphProto,
    *,
    without: Iterable[str],
    first: Iterable[onnx.NodeProto],
    last: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto] = (),
    outputs: Iterable[onnx.ValueInfoProto] = (),
) -> None:
    """Edit a graph: inputs and outputs that go and come, nodes before all others and after them."""
    gone = set(without)
    parts = {
        "node": [*first, *graph.node, *last],
        "input": [*(one for one in graph.input if one.name not in gone), *inputs],
        "output": [*(one for one in graph.output if one.name not in gone), *outputs],
    }
    for field, values in parts.items():
        graph.ClearField(field)
        getattr(graph, field).extend(values)
