"""A bundle as a model on the CPU that computes as a GPU would, in nodes that a CPU is quick at."""

from __future__ import annotations

import onnx_ir as ir

from ..bundle.opened import Bundle
from ..files import temporary_folder
from ..graph.passes.emulate import Emulate
from ..graph.passes.halves import HalveBytes
from ..graph.schemes.nbits import EXACT_ACTIVATIONS, INT8_ACTIVATIONS
from ..graph.strangers import load_linked, reading
from ..recipe import GRAPHS, SCHEMES, Recipe
from ..runtime.model import Model
from ..runtime.sessions.cpu import CpuSession
from .cut import parts
from .parts import PartedModel, PartedSession


def emulate(graph: ir.Model) -> bool:
    """Change a graph into the one that the CPU runs in its place; whether there was anything to change."""
    changed = [bool(each(graph).modified) for each in (Emulate(), HalveBytes())]
    return any(changed)


def rounds_inputs(recipe: Recipe, graph: str) -> bool:
    """Whether a graph rounds the inputs of its matmuls, and may sum one row of them in another order than several.

    Then a step may round other numbers than a window. Our own matmul has one order.
    """
    row = GRAPHS[graph]
    return SCHEMES[recipe.scheme].input_bits is not None and not (row.matmul or row.exact)


def _keep_inputs(graph: ir.Graph) -> bool:
    """Have matmuls round their inputs no more; whether there are any."""
    found = [node for node in graph if node.attributes.get_int("accuracy_level", 0) == INT8_ACTIVATIONS]
    for node in found:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", EXACT_ACTIVATIONS)
    return bool(found)


def load_emulated(bundle: Bundle, graph: str, *, threads: int | None = None, exact: bool = False) -> Model:
    """Load a graph of a bundle on the CPU; values of fp16 or bf16 are float32 rounded to the type.

    exact: matmuls do not round their inputs, see `rounds_inputs`.

    ONNX Runtime has no bfloat16 kernels for the CPU, and its float16 graphs compute in float32 without
    rounding in between: neither would tell what a GPU computes. No step unpacks weights: a matmul of one token
    takes a fraction of that time.
    """
    loaded = load_linked(bundle, graph)
    with reading(bundle.graph_file(graph)):
        changed = exact and _keep_inputs(loaded.graph)
        emulated = emulate(loaded) or changed
        if not emulated:  # onnxruntime reads the weights, by their names in the bundle
            loaded = ir.load(bundle.graph_file(graph))
        cut = parts(loaded.graph)
    if len(cut) > 1:
        session = PartedSession(bundle, graph, loaded, cut, written=emulated, threads=threads)
        return PartedModel(bundle, session)
    if not emulated:
        return Model(bundle, CpuSession(bundle, graph, threads=threads, unpacked=True))
    with temporary_folder() as folder:
        file = folder / "model.onnx"
        with reading(bundle.graph_file(graph)):
            ir.save(loaded, file, external_data="model.onnx.data")
        return Model(bundle, CpuSession(bundle, graph, threads=threads, file=file, unpacked=True))
