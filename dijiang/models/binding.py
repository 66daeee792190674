"""Tables that say which tensors of a checkpoint make up each canonical weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .spec import ModelSpec

Array = np.ndarray
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Binding:
    """One tensor of a checkpoint: its name, its shape there, and its canonical form."""

    source: str
    shape: Shape
    to_canonical: Callable[[Array], Array] = lambda tensor: tensor


#: Canonical weight -> the tensors it is made of, side by side along the last axis.
Bindings = dict[str, tuple[Binding, ...]]


def transposed(tensor: Array) -> Array:
    """[out, in] -> [in, out]."""
    return tensor.T


def plain(name: str, source: str, shape: Shape) -> Bindings:
    """A tensor that is canonical as it is."""
    return {name: (Binding(source, shape),)}


def linear(name: str, sources: Sequence[tuple[str, int]], inputs: int, *, bias: bool) -> Bindings:
    """Weight and bias of the projections `sources`, (module, outputs) each, side by side."""
    weight = tuple(Binding(f"{module}.weight", (out, inputs), transposed) for module, out in sources)
    biases = tuple(Binding(f"{module}.bias", (out,)) for module, out in sources)
    return {f"{name}.weight": weight} | ({f"{name}.bias": biases} if bias else {})


def norm(name: str, module: str, spec: ModelSpec) -> Bindings:
    """Weight of a norm over the hidden channels, and its bias if the family's norm has one."""
    kinds = ("weight",) if spec.norm == "rms" else ("weight", "bias")
    return {f"{name}.{k}": (Binding(f"{module}.{k}", (spec.hidden_size,)),) for k in kinds}


#: Ends of the names of the tensors that a DiJiang model has and a vanilla one has not.
ADDED = (".proj_matrix", ".W_G", ".D1", ".D2", ".group_norm.weight", ".group_norm.bias")


def added(module: str, spec: ModelSpec) -> Bindings:
    """What DiJiang adds to a layer's attention module, in every family."""
    d, size = spec.hidden_size, spec.head_size
    table = (1, spec.num_kv_heads, spec.max_positions, 1)
    return {
        **plain("gate.weight", f"{module}.W_G", (d, d)),
        **plain("proj.weight", f"{module}.proj_matrix", (size, size)),
        "D1": (Binding(f"{module}.D1", table, _rows),),
        "D2": (Binding(f"{module}.D2", table, _rows),),
        **plain("group_norm.weight", f"{module}.group_norm.weight", (d,)),
        **plain("group_norm.bias", f"{module}.group_norm.bias", (d,)),
    }


def _rows(tensor: Array) -> Array:
    return tensor[0, :, :, 0]


def layered(model: Bindings, layer: Bindings, prefix: str, count: int) -> Bindings:
    """The whole model's table: `model`, and `layer` once for each layer under `prefix{l}.`."""
    layers = {
        f"layers.{index}.{name}": tuple(replace(part, source=f"{prefix}{index}.{part.source}") for part in parts)
        for index in range(count)
        for name, parts in layer.items()
    }
    return model | layers


def without_prefix(bindings: Bindings, prefix: str) -> Bindings:
    """The table for files saved from the base model, whose names lack its prefix."""
    return {
        name: tuple(replace(part, source=part.source.removeprefix(prefix)) for part in parts)
        for name, parts in bindings.items()
    }


def renamed(bindings: Bindings, old: str, new: str) -> Bindings:
    """The table with another name for one tensor."""
    return {
        name: tuple(replace(part, source=new) if part.source == old else part for part in parts)
        for name, parts in bindings.items()
    }


def shapes(bindings: Bindings) -> dict[str, Shape]:
    """Shape of every tensor of the checkpoint, by its name there."""
    return {part.source: part.shape for parts in bindings.values() for part in parts}
