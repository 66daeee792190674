"""From a checkpoint folder to a Model: spec, weights and decays, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from . import gpt_neox
from .checkpoint import Checkpoint
from .decay import Decay, analyse, position_limit, without_tables
from .spec import ModelSpec
from .weights import Binding, Weights, check_tensors, is_decay_table

DecayMode = Literal["exact", "analytic"]


@dataclass(frozen=True)
class Family:
    """What a family file provides."""

    spec: Callable[[dict[str, Any]], ModelSpec]
    bindings: Callable[[ModelSpec], dict[str, Binding]]
    ignored: tuple[str, ...] = ()


#: model_type of config.json -> family. A new family is one file and one row.
FAMILIES = {
    "gpt_neox": Family(gpt_neox.spec, gpt_neox.bindings, gpt_neox.IGNORED),
}


@dataclass(frozen=True)
class DijiangModel:
    """A checkpoint ready to be exported or run by the reference."""

    path: Path
    spec: ModelSpec
    weights: Weights
    decays: tuple[Decay, ...]
    checkpoint: Checkpoint = field(repr=False)

    @property
    def parameters(self) -> int:
        """Numbers in the weights, D1 and D2 left out; a tied head is counted once."""
        shared = ("head.weight",) if self.spec.tied_embeddings else ()
        names = (n for n in self.weights if n not in shared and not is_decay_table(n))
        return sum(math.prod(self.weights.shape(name)) for name in names)

    @property
    def positions_limit(self) -> int | None:
        """Positions that can be decoded; None: no end."""
        return position_limit(self.decays)


def load_checkpoint(
    path: str | Path, *, decay: DecayMode = "exact", repair_decay: bool = False
) -> DijiangModel:
    """Open a DiJiang checkpoint folder of the published layout.

    Args:
        path: folder with config.json and safetensors or PyTorch weights, sharded or not.
        decay: `exact` keeps trained D1/D2 as tables; `analytic` drops them.
        repair_decay: allow a key scale of 1 where a trained D2 was lost to overflow.

    Raises:
        CheckpointError: anything about the folder that does not fit.
    """
    checkpoint = Checkpoint(path)
    kind = checkpoint.config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise CheckpointError(
            f"{path}: model_type {kind!r} is not supported, expected one of {', '.join(FAMILIES)}"
        )
    spec = _spec(family, checkpoint)
    bindings = family.bindings(spec)
    check_tensors(checkpoint, bindings, lambda name: name.endswith(family.ignored))
    weights = Weights(checkpoint, bindings)
    decays = tuple(
        without_tables(d1, d2)
        if decay == "analytic"
        else analyse(d1, d2, layer=layer, repair=repair_decay)
        for layer in range(spec.num_layers)
        for d1, d2 in [(weights[f"layers.{layer}.D1"], weights[f"layers.{layer}.D2"])]
    )
    return DijiangModel(Path(path), spec, weights, decays, checkpoint)


def _spec(family: Family, checkpoint: Checkpoint) -> ModelSpec:
    """The family's reading of config.json; keys of the wrong kind are an error of the checkpoint."""
    try:
        return family.spec(checkpoint.config)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}/config.json: no key {error}; add it") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: a value of the wrong kind ({error}); fix it"
        ) from error
