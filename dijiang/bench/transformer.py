"""Writing the vanilla Transformer of a bundle's shape, for `dijiang bench --baseline transformer`.

The same graph writer as a bundle; only the attention differs: ONNX Runtime's
GroupQueryAttention on packed q, k and v with rotary positions inside and keys and values written in
place. The weights are random: they do not change the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import onnx_ir as ir

from ..bundle.manifest import DATA
from ..bundle.opened import Bundle
from ..errors import ExportError
from ..exporter.pipeline import store_weights
from ..graph.layers.keyvalue import ELEMENTS, cached
from ..graph.passes import optimise
from ..graph.passes.types import TYPES
from ..graph.reads import parameter_reads
from ..graph.schemes import Rounder
from ..graph.writer import Writer
from ..models.binding import Bindings, shapes
from ..models.initial import SPREAD
from ..models.load import FAMILIES
from ..models.spec import ModelSpec
from ..models.weights import Weights
from ..recipe import GRAPHS, Recipe, resolve
from ..runtime.sessions.inference import runs_here
from .cached import FILE, POSITIONS, CachedSubject
from .subject import Side, Traffic


class RandomTensors:
    """Stands in for a checkpoint: each tensor is drawn when it is read."""

    path = Path("random weights")

    def __init__(self, bindings: Bindings) -> None:
        self._shapes = shapes(bindings)

    def read(self, name: str) -> np.ndarray:
        """float32, of the shape that the family has."""
        random = np.random.default_rng(crc32(name.encode()))
        drawn = random.standard_normal(self._shapes[name], dtype=np.float32) * np.float32(SPREAD)
        return drawn + np.float32(1) if name.endswith("norm.weight") else drawn


@dataclass(frozen=True)
class VanillaModel:
    """What the graph writer needs to know: a spec, weights, and no decay anywhere."""

    spec: ModelSpec
    weights: Weights
    positions_limit: int
    decays: tuple[()] = ()


def random_weights(spec: ModelSpec) -> Weights:
    """Weights of a spec's family, random."""
    bindings = FAMILIES[spec.family].bindings(spec)
    return Weights(RandomTensors(bindings), bindings)


def transformer_graph(
    model: VanillaModel, recipe: Recipe, cache: str, *, tied: bool = False, rounder: Rounder | None = None
) -> ir.Model:
    """The Transformer of a model, its weights stored as a recipe says; see `exporter.pipeline.step_graph`."""
    # What its layers stand in the place of: the same matmuls as the bundle's.
    like = next(row for name in recipe.graphs if (row := GRAPHS[name]).fused and runs_here(name))
    written = optimise(Writer(model, cached(cache), opset=like.opset, fused=like.fused).write(), skip_norms=True)
    return store_weights(written, recipe, like, tied=tied, rounder=rounder)


def write_transformer(
    spec: ModelSpec, folder: Path, positions: int, *, recipe: Recipe | None = None, cache: str = "fp16"
) -> Traffic:
    """Write graph and weights of a Transformer into a folder; the bytes its steps move.

    Args:
        positions: tokens that a sequence can have.
        recipe: of the weights; None: as they are, in float32.
        cache: element type of keys and values: fp32, fp16 or int8.
    """
    model = VanillaModel(spec, random_weights(spec), positions)
    graph = transformer_graph(model, recipe or resolve(runs_here=runs_here), cache)
    graph.metadata_props[POSITIONS] = str(spec.max_positions if spec.learned_positions else positions)
    ir.save(graph, folder / FILE, external_data=DATA)
    reads, width = parameter_reads(graph), 2 * spec.num_layers * spec.num_kv_heads * spec.head_size
    return Traffic(reads["step"], reads["token"], cache=width * ELEMENTS[cache][0].itemsize)


def build_transformer(name: str, bundle: Bundle, folder: Path, positions: int, *, cache: str = "fp16") -> Side:
    """The Transformer of a bundle's shape and precision in an empty folder, ready to be measured.

    Raises:
        ExportError: a graph, precision or cache that has no such baseline, or a full disk.
    """
    spec, recipe = bundle.manifest.spec, bundle.manifest.recipe
    if cache not in ELEMENTS:
        raise ExportError(f"cache {cache!r} is unknown, expected one of {', '.join(ELEMENTS)}")
    if recipe.type in TYPES or not any(GRAPHS[name].fused and runs_here(name) for name in recipe.graphs):
        raise ExportError(
            f"{recipe.precision} in the {' and '.join(recipe.graphs)} graph has no baseline to compare "
            "with; export with --precision int8 or fp32 for the CPU"
        )
    try:
        plain = replace(recipe, budget=None)  # its projections have other names; it reads fewer bytes
        traffic = write_transformer(spec, folder, positions, recipe=plain, cache=cache)
    except OSError as error:
        raise ExportError(
            f"{folder}: the baseline cannot be written ({error.strerror or error}); "
            "free some space, or set TMPDIR to a larger disk"
        ) from error
    facts = {
        "kind": "transformer",
        "precision": recipe.precision,
        "graph": f"GroupQueryAttention, {cache} keys and values",
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "weight_bytes": (folder / DATA).stat().st_size,
        "parameter_count": bundle.manifest.parameters,
        "spec": spec.to_dict(),
    }
    return Side(f"Transformer of {name}", str(folder), CachedSubject, traffic, facts, baseline_of=name)
