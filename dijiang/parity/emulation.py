"""A bundle in a 16-bit type as a model on the CPU, with arithmetic rounded as the type's would be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from ..bundle.manifest import DATA, GRAPH, Bundle, open_bundle
from ..graph.passes.emulate import Emulate
from ..runtime.model import Model
from ..runtime.sessions.base import OrtSession
from .cut import parts
from .parts import PartedModel, PartedSession


def load_emulated(bundle: str | Path, *, threads: int | None = None, check_hashes: bool = True) -> Model:
    """Load a bundle on the CPU; values of fp16 or bf16 are float32 rounded to the type.

    ONNX Runtime has no bfloat16 kernels for the CPU, and its float16 graphs compute in float32 without
    rounding in between: neither would tell what a GPU computes.
    """
    opened = open_bundle(bundle, check_hashes=check_hashes)
    graph = ir.load(opened.graph)
    emulated = bool(Emulate()(graph).modified)
    if len(parts(graph.graph)) > 1:
        return PartedModel(opened, PartedSession(opened, graph, written=emulated, threads=threads))
    if not emulated:
        return Model(opened, OrtSession(opened, provider="cpu", threads=threads))
    with TemporaryDirectory(prefix="dijiang-") as folder:
        ir.save(graph, Path(folder) / GRAPH, external_data=DATA)
        rounded = Bundle(Path(folder), replace(opened.manifest, precision="fp32"))
        return Model(opened, OrtSession(rounded, provider="cpu", threads=threads))
