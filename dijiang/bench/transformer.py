"""Writing the vanilla Transformer of a bundle's shape, for `dijiang bench --baseline transformer`.

The same graph writer as a bundle; only the attention differs: ONNX Runtime's
GroupQueryAttention on packed q, k and v with rotary positions inside and keys and values written in
place. The weights are random: they do not change the time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import onnx_ir as ir

from ..bundle import names
from ..bundle.manifest import DATA, GRAPH, Bundle
from ..errors import ExportError
from ..graph.attention import DIALECTS
from ..graph.blocks import rotary_angles, rotate
from ..graph.builder import CONTRIB
from ..graph.passes import optimise
from ..graph.passes.quantize import Quantize
from ..graph.precision import precision_of
from ..graph.reads import parameter_reads
from ..graph.writer import Writer
from ..models.binding import Bindings
from ..models.decay import Decay
from ..models.initial import SPREAD
from ..models.load import FAMILIES
from ..models.rotary import inverse_frequencies
from ..models.spec import ModelSpec
from ..models.weights import Weights
from .cached import CACHE_TYPES, FACTS, CachedFacts, load_cached
from .facts import without_baseline
from .subject import Side
from .traffic import Traffic

#: Kind of cache -> the element type of keys and values, and of what the attention node computes in.
ELEMENTS = {
    "fp32": (ir.DataType.FLOAT, ir.DataType.FLOAT),
    "fp16": (ir.DataType.FLOAT16, ir.DataType.FLOAT16),
    "int8": (ir.DataType.INT8, ir.DataType.FLOAT),
}
#: Scale of an int8 cache: random values have no better one.
CACHE_SCALE = 0.05
#: Channels that the node's rotary kernel takes at once.
ROTARY_VECTOR = 8


class RandomTensors:
    """Stands in for a checkpoint: each tensor is drawn when it is read."""

    def __init__(self, bindings: Bindings) -> None:
        self._shapes = {part.source: part.shape for parts in bindings.values() for part in parts}

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


class VanillaWriter(Writer):
    """A step graph with a key-value cache in the place of the recurrent state."""

    def __init__(self, model: VanillaModel, cache: str) -> None:
        super().__init__(model, DIALECTS["ort"])  # type: ignore[arg-type]
        self._cache, self._positions = cache, model.positions_limit
        self._past: list[ir.Value] = []
        self._present: list[ir.Value] = []

    @property
    def reads_positions(self) -> bool:
        """Whether the graph has an input for positions."""
        return self.spec.learned_positions or (self.spec.rotary_dims > 0 and not self._rotates_inside)

    def write(self) -> ir.Model:
        b, spec = self.b, self.spec
        step: list[str | int] = ["batch", "sequence"]
        ids = b.input(names.INPUT_IDS, ir.DataType.INT64, step)
        if self.reads_positions:
            self.positions = b.input(names.POSITION_IDS, ir.DataType.INT64, step)
        kept = b.input(names.LOGIT_INDICES, ir.DataType.INT64, ["batch", "kept"])
        self.last = b.input(names.LAST_POSITION, ir.DataType.INT32, ["batch"])
        self.total = b.input(names.TOTAL_LENGTH, ir.DataType.INT32, [])
        stored, _ = ELEMENTS[self._cache]
        shape: list[str | int] = ["batch", spec.num_kv_heads, "capacity", spec.head_size]
        if spec.rotary_dims and not self._rotates_inside:
            self.angles = rotary_angles(b, self.positions, spec, self._positions)
        x = self._embed(ids)
        caches = []
        for layer in range(spec.num_layers):
            self._past = [b.input(name, stored, shape) for name in names.past_cache(layer)]
            x, _ = self._layer(layer, None, x, self._past[0])  # type: ignore[arg-type]
            caches.append(self._present)
        index = b.op("Unsqueeze", kept, b.constant([-1], np.int64))
        logits = self._logits(b.op("GatherND", x, index, batch_dims=1))
        b.output(logits, names.LOGITS, ir.DataType.FLOAT, ["batch", "kept", spec.vocab_size])
        for layer, pair in enumerate(caches):
            for name, value in zip(names.present_cache(layer), pair, strict=True):
                b.output(value, name, stored, shape)
        return b.model("transformer", {})

    def _attention(self, prefix: str, decay: Decay, x: ir.Value, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        b, spec = self.b, self.spec
        stored, computed = ELEMENTS[self._cache]
        heads = self._heads(self._linear(f"{prefix}.qkv", x))
        if computed != ir.DataType.FLOAT:
            heads = [h if h is None else b.op("Cast", h, to=computed) for h in heads]
        quantized = stored == ir.DataType.INT8
        scale = b.constant([CACHE_SCALE]) if quantized else None
        optional = [None, None, None, scale, scale] if quantized else []
        rounding = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        out, *self._present = b.ops(
            "GroupQueryAttention",
            3,
            *heads,
            *self._past,
            self.last,
            self.total,
            *(self._rotary_tables() if self._rotates_inside else [None, None]),
            *optional,
            domain=CONTRIB,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            do_rotary=int(self._rotates_inside),
            scale=1 / math.sqrt(spec.head_size),
            **(rounding if quantized else {}),
        )
        if computed != ir.DataType.FLOAT:
            out = b.op("Cast", out, to=ir.DataType.FLOAT)
        return self._linear(f"{prefix}.out", out), self._present[0]

    @property
    def _rotates_inside(self) -> bool:
        """Whether the attention node can rotate: its kernel takes half-widths that are whole vectors."""
        return self.spec.rotary_dims > 0 and self.spec.rotary_dims // 2 % ROTARY_VECTOR == 0

    def _heads(self, qkv: ir.Value) -> list[ir.Value | None]:
        """Query, key and value inputs: packed, or rotated before the node where it cannot rotate."""
        b, spec = self.b, self.spec
        if self._rotates_inside or not spec.rotary_dims:
            return [qkv, None, None]
        q, kv = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        qk, v = b.ops("Split", 2, qkv, b.constant([q + kv, kv], np.int64), axis=-1)
        qk = rotate(b, qk, self.angles, spec, fused=True)
        return [*b.ops("Split", 2, qk, b.constant([q, kv], np.int64), axis=-1), v]

    def _rotary_tables(self) -> list[ir.Value]:
        """cos and sin [positions, rotary_dims / 2]."""
        angles = np.outer(np.arange(self._positions, dtype=np.float64), inverse_frequencies(self.spec))
        _, computed = ELEMENTS[self._cache]
        element = np.float16 if computed == ir.DataType.FLOAT16 else np.float32
        return [self.b.constant(f(angles), element) for f in (np.cos, np.sin)]


def random_weights(spec: ModelSpec) -> Weights:
    """Weights of a spec's family, random."""
    bindings = FAMILIES[spec.family].bindings(spec)
    return Weights(RandomTensors(bindings), bindings)  # type: ignore[arg-type]


def write_transformer(
    spec: ModelSpec, folder: Path, positions: int, *, precision: str = "fp32", cache: str = "fp16"
) -> Traffic:
    """Write graph, weights and facts of a Transformer into a folder; the bytes its steps move.

    Args:
        positions: tokens that a sequence can have.
        precision: of the weights, as for `export`.
        cache: element type of keys and values: fp32, fp16 or int8.
    """
    writer = VanillaWriter(VanillaModel(spec, random_weights(spec), positions), cache)
    graph = optimise(writer.write(), skip_norms=True)
    rounding = precision_of(precision)
    if rounding.quantized:
        Quantize(rounding)(graph)
    ir.save(graph, folder / GRAPH, external_data=DATA)
    facts = CachedFacts(
        vocab_size=spec.vocab_size,
        layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        positions=spec.max_positions if spec.learned_positions else positions,
        cache=cache,
        position_ids=writer.reads_positions,
    )
    (folder / FACTS).write_text(json.dumps(vars(facts)), encoding="utf-8")
    reads = parameter_reads(graph)
    return Traffic(reads["step"], reads["token"], cache=facts.token_bytes)


def build_transformer(bundle: Bundle, folder: Path, positions: int, *, cache: str = "fp16") -> Side:
    """The Transformer of a bundle's shape and precision in an empty folder, ready to be measured.

    Raises:
        ExportError: a dialect, precision or cache that has no such baseline, or a full disk.
    """
    manifest = bundle.manifest
    if cache not in CACHE_TYPES:
        raise ExportError(f"cache {cache!r} is unknown, expected one of {', '.join(CACHE_TYPES)}")
    reason = without_baseline(manifest.precision, manifest.dialect)
    if reason:
        raise ExportError(reason)
    try:
        traffic = write_transformer(manifest.spec, folder, positions, precision=manifest.precision, cache=cache)
    except OSError as error:
        raise ExportError(
            f"{folder}: the baseline cannot be written ({error.strerror or error}); "
            "free some space, or set TMPDIR to a larger disk"
        ) from error
    name = bundle.path.resolve().name
    facts = {
        "kind": "transformer",
        "precision": manifest.precision,
        "dialect": f"GroupQueryAttention, {cache} keys and values",
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "spec": manifest.spec.to_dict(),
    }
    return Side(f"Transformer of {name}", str(folder), load_cached, traffic, facts, baseline_of=name)
