"""A bundle's graph in a folder of its own, with the inputs and outputs that another runtime feeds and reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import onnx

from .. import Bundle, ExportError
from ..recipe import GRAPHS, PROVIDERS

#: Bytes that the system is asked to copy at once.
PIECE = 1 << 30


def standalone(bundle: Bundle) -> list[str]:
    """The graphs of a bundle that need no compiled operator, the best first; ExportError if there is none."""
    found = [name for name in bundle.manifest.graphs if not GRAPHS[name].operators]
    if not found:
        raise ExportError(f"{bundle.path}: every graph needs the compiled operator; export again without --graph")
    return found


def needs(bundle: Bundle, name: str) -> list[str]:
    """What another runtime has to know of a graph that was written for it, a line each."""
    record = bundle.manifest.graphs[name]
    return [
        f"the {name} graph: it needs onnxruntime {record.onnxruntime} or newer, and graph optimizations that are on"
    ]


def on_gpu(bundle: Bundle, name: str) -> bool:
    """Whether no CPU runs a graph: whatever does has numbers, as GPUs have."""
    return all(PROVIDERS[provider].numbered for provider in bundle.manifest.graphs[name].providers)


def write_graph(
    bundle: Bundle, name: str, file: Path, adapt: Callable[[onnx.GraphProto], None], *, link: bool
) -> None:
    """Write one of a bundle's graphs after `adapt`, and the weights beside it: see `place`."""
    model = onnx.load(bundle.graph_file(name), load_external_data=False)
    adapt(model.graph)
    onnx.save(model, file)
    for data in (data for data in bundle.manifest.files if data.endswith(".data")):
        place(bundle.path / data, file.parent / data, link=link)


def place(source: Path, target: Path, *, link: bool) -> None:
    """A copy, which shares its blocks where the file system can do that.

    link: the same file under another name, where the disk can do that. onnx refuses to read such a file.
    """
    if link:
        with suppress(OSError):  # another disk, or one without links
            os.link(source.resolve(), target)
            return
    with source.open("rb") as read, target.open("wb") as written:
        with suppress(OSError, AttributeError):  # file systems that cannot do that, or no Linux
            while os.copy_file_range(read.fileno(), written.fileno(), PIECE):
                pass
        shutil.copyfileobj(read, written)  # the rest, from where both are


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
