"""Graphs of bundles that onnx-ir reads, whoever wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..bundle.manifest import AGAIN
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
