"""From a checkpoint folder to a Model: spec, weights and decays, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import CheckpointError
from . import gpt_neox, llama, opt
from .binding import Bindings, renamed, shapes, without_prefix
from .checkpoint import Checkpoint
from .config import brief
from .decay import Decay, analyse, position_limit, without_tables
from .spec import ModelSpec
from .weights import Weights, check_tensors, is_decay_table

DecayMode = Literal["exact", "analytic"]


@dataclass(frozen=True)
class Family:
    """What a family file provides.

    prefix: of the base model's tensors; files saved from the base model alone lack it.  heads: legal
    names of an untied head, the first as the bindings have it.  ignored: ends of names that carry
    nothing.  published_config: the config.json of a converted checkpoint, from the vanilla one's.
    """

    spec: Callable[[dict[str, Any]], ModelSpec]
    bindings: Callable[[ModelSpec], Bindings]
    prefix: str
    heads: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    published_config: Callable[[dict[str, Any]], dict[str, Any]] = dict


#: model_type of config.json -> family. A new family is one file and one row.
FAMILIES = {
    "gpt_neox": Family(
        gpt_neox.spec,
        gpt_neox.bindings,
        "gpt_neox.",
        ("embed_out.weight", "lm_head.weight"),  # transformers 5 calls it so in memory
        gpt_neox.IGNORED,
        gpt_neox.published_config,
    ),
    "llama": Family(llama.spec, llama.bindings, "model.", ("lm_head.weight",), llama.IGNORED),
    "opt": Family(opt.spec, opt.bindings, "model.", ("lm_head.weight",), opt.IGNORED),
}


@dataclass(frozen=True)
class DijiangModel:
    """A checkpoint ready to be exported or run by the reference.

    decay_mode: how `decays` were read: exact, analytic or repaired, see `load_checkpoint`.
    """

    path: Path
    spec: ModelSpec
    weights: Weights
    decays: tuple[Decay, ...]
    decay_mode: str
    checkpoint: Checkpoint = field(repr=False)

    @property
    def parameters(self) -> int:
        """Numbers in the weights, D1 and D2 left out; what makes two of them is counted once."""
        found = shapes(self.weights.bindings)
        return sum(math.prod(shape) for name, shape in found.items() if not is_decay_table(name))

    @property
    def layer_parameters(self) -> int:
        """Numbers in the weights of one layer; all layers have the same shapes."""
        names = (n for n in self.weights if n.startswith("layers.0.") and not is_decay_table(n))
        return sum(math.prod(self.weights.shape(name)) for name in names)

    @property
    def positions_limit(self) -> int | None:
        """Positions that can be decoded; None: no end."""
        learned = self.spec.max_positions if self.spec.learned_positions else None
        return min((n for n in (position_limit(self.decays), learned) if n is not None), default=None)

    @property
    def limit_reason(self) -> str | None:
        """Why positions end; None where they do not."""
        limit = self.positions_limit
        if position_limit(self.decays) is not None:
            return (
                f"D1 and D2 of this checkpoint were trained, or rounded, and stored for {limit} positions "
                "(an export with --decay analytic drops them)"
            )
        return None if limit is None else f"this model has learned embeddings for {limit} positions"


def load_checkpoint(path: str | Path, *, decay: DecayMode = "exact", repair_decay: bool = False) -> DijiangModel:
    """Open a DiJiang checkpoint folder of the published layout.

    Args:
        path: folder with config.json and safetensors or PyTorch weights, sharded or not.
        decay: `exact` keeps trained D1/D2 as tables; `analytic` drops them.
        repair_decay: allow a key scale of 1 where a trained D2 was lost to overflow.

    Raises:
        CheckpointError: anything about the folder that does not fit.
    """
    checkpoint = Checkpoint(path)
    family = family_of(checkpoint)
    spec = read_spec(family, checkpoint)
    bindings = named_as_in(checkpoint, family, family.bindings(spec))
    wanted = shapes(bindings)
    if is_vanilla(checkpoint) and not checkpoint.shapes.keys().isdisjoint(wanted):
        raise CheckpointError(
            f"{path}: a vanilla checkpoint (no proj_matrix in any layer), expected a DiJiang one; "
            "run dijiang convert on it first"
        )
    check_tensors(checkpoint, wanted, ignored_by(family, spec))
    weights = Weights(checkpoint, bindings)
    decays = tuple(
        without_tables(d1, d2) if decay == "analytic" else analyse(d1, d2, layer=layer, repair=repair_decay)
        for layer in range(spec.num_layers)
        for d1, d2 in [(weights[f"layers.{layer}.D1"], weights[f"layers.{layer}.D2"])]
    )
    mode = "repaired" if any(each.repaired for each in decays) else decay
    return DijiangModel(Path(path), spec, weights, decays, mode, checkpoint)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that config.json names; CheckpointError for one that is not supported."""
    kind = checkpoint.config.get("model_type")
    if str(kind) not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint.path}: model_type {brief(kind)} is not supported, expected one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[str(kind)]


def is_vanilla(checkpoint: Checkpoint) -> bool:
    """Whether no layer has a projection matrix, as before the conversion."""
    return not any(name.endswith(".proj_matrix") for name in checkpoint.shapes)


def named_as_in(checkpoint: Checkpoint, family: Family, bindings: Bindings) -> Bindings:
    """The bindings as the checkpoint names its tensors.

    Without the family's prefix if no tensor has it. The head may have any of its legal names, and a tied table
    the head's name only.

    Raises:
        CheckpointError: config.json says that the head is the embedding, and the file's head is another.
    """
    if not any(name.startswith(family.prefix) for name in checkpoint.shapes):
        bindings = without_prefix(bindings, family.prefix)
    table, head = bindings["embed.weight"][0].source, bindings["head.weight"][0].source
    stored = [name for name in family.heads if name in checkpoint.shapes]
    if table != head:
        return renamed(bindings, head, stored[0]) if stored else bindings
    if stored and table not in checkpoint.shapes:
        return renamed(bindings, table, stored[0])
    for name in stored:
        if not np.array_equal(checkpoint.read(table), checkpoint.read(name)):
            raise CheckpointError(
                f"{checkpoint.path}: {name} is not {table}, although config.json says tie_word_embeddings: "
                "set it to false, or remove the tensor"
            )
    return bindings


def ignored_by(family: Family, spec: ModelSpec) -> tuple[str, ...]:
    """Ends of names that carry nothing; a tied model's file may repeat its embedding as the head."""
    return (*family.ignored, *family.heads) if spec.tied_embeddings else family.ignored


def read_spec(family: Family, checkpoint: Checkpoint) -> ModelSpec:
    """The family's reading of config.json; keys of the wrong kind are an error of the checkpoint."""
    try:
        spec = family.spec(checkpoint.config | checkpoint.generation)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}/config.json: no key {error}; add it") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: a value of the wrong kind ({error}); fix it"
        ) from error
    if spec.num_layers > len(checkpoint.shapes):
        raise CheckpointError(
            f"{checkpoint.path}/config.json: {spec.num_layers} layers, but the files hold "
            f"{len(checkpoint.shapes)} tensors; it is the config of another model"
        )
    return spec
