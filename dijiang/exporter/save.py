"""Several graphs over one data file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import CallbackInfo, convert_tensors_to_external
from onnx_ir.serde import SerdeError

from ..bundle.manifest import DATA
from ..errors import DijiangError
from ..recipe import GRAPHS

#: Larger tensors are in the data file, so that a graph is some kilobytes.
INLINE_BYTES = 256


def shared_tensors(graphs: Mapping[str, ir.Model]) -> dict[str, ir.TensorProtocol]:
    """What the data file holds, in its order: one tensor for each name that any graph has."""
    found: dict[str, ir.TensorProtocol] = {}
    for graph in graphs.values():
        for name, value in graph.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE_BYTES:
                continue
            known = found.setdefault(name, tensor)
            assert (known.dtype, known.shape) == (tensor.dtype, tensor.shape), name
    return found


def data_bytes(graphs: Mapping[str, ir.Model]) -> int:
    """Size of the data file."""
    return sum(tensor.nbytes for tensor in shared_tensors(graphs).values())


def save_model(graph: ir.Model, file: Path, external_data: str | None = None) -> None:
    """Write a graph; what a weight is refused for, while it is read, is the error as it was.

    external_data: file beside it for its weights; None: they are in the graph.
    """
    try:
        ir.save(graph, file, external_data=external_data)
    except SerdeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DijiangError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from error


def save_graphs(graphs: Mapping[str, ir.Model], folder: Path, writers: int, through: Callable[[int], None]) -> None:
    """Write data and graphs; each tensor is computed when its turn comes, and dropped.

    Args:
        writers: tensors that are computed and written at once.
        through: told about bytes of the data file, in any order where there are two writers.
    """
    tensors = shared_tensors(graphs)

    def shown(_: ir.TensorProtocol, info: CallbackInfo) -> None:
        through(info.offset)

    known = signature(convert_tensors_to_external).parameters
    # onnx-ir before 1.1 has no such option, and one writer.
    together = {"max_workers": writers} if "max_workers" in known else {}
    external = convert_tensors_to_external(list(tensors.values()), folder, DATA, callback=shown, **together)
    stored: dict[str, ir.TensorProtocol] = dict(zip(tensors, external, strict=True))
    for name, graph in graphs.items():
        for key, value in graph.graph.initializers.items():
            if key not in stored and value.const_value is not None:
                stored[key] = ir.tensor(value.const_value.numpy(), value.dtype, name=key)
            value.const_value = stored.get(key)
        save_model(graph, folder / GRAPHS[name].file)
