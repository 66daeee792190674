"""Graphs of bundles that onnx-ir reads, whoever wrote them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from ..bundle.manifest import AGAIN
from ..bundle.opened import Bundle
from ..errors import BundleError, DijiangError
from ..runtime.sessions.inference import first_line


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """BundleError for whatever onnx-ir or a pass dies of, in a graph that `open_bundle` let through."""
    try:
        yield
    except DijiangError:
        raise
    except Exception as error:  # those of onnx-ir, protobuf and passes share no base class
        raise BundleError(
            f"{file}: cannot be read as a graph ({first_line(error)[:200]}); do not use it: {AGAIN}"
        ) from error


def load_linked(bundle: Bundle, graph: str) -> ir.Model:
    """A graph of a bundle, whose weights may lie behind links, as in the Hub's cache; BundleError: it is none.

    onnx-ir reads no data behind a link that leaves the folder, nor a file that has two names. Which ones a bundle
    may have, `open_bundle` has checked.
    """
    file = bundle.graph_file(graph)
    with reading(file):
        model = ir.load(file)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) in bundle.manifest.files:
                value.const_value = ir.ExternalTensor(
                    os.path.realpath(tensor.path),
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                )
    return model
