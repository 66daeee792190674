"""From a vanilla checkpoint of a family to a DiJiang checkpoint, tensor by tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..progress import Progress, silent
from .binding import ADDED, shapes
from .checkpoint import Checkpoint
from .initial import first_values
from .load import family_of, ignored_by, is_vanilla, named_as_in, read_spec
from .store import nbytes, write_checkpoint
from .tokenizer import find_tokenizer
from .weights import check_tensors, is_decay_table, read_finite

#: Files of a checkpoint that stay as they are.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
#: In the names of tensors of layers.
IN_LAYER = re.compile(r"\.\d+\.")
#: What the caller has to do with the result.
NEXT = "fine-tune it with D1 and D2 frozen (examples/finetune.md): until then its text makes no sense"


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote: parameters of the family kept, and new ones (D1 and D2 left out).

    notes: what was done to read the vanilla checkpoint, a line each.
    """

    path: Path
    family: str
    kept: int
    added: int
    notes: tuple[str, ...]


def convert(vanilla: str | Path, output: str | Path, *, seed: int = 0, progress: Progress = silent) -> Conversion:
    """Turn a vanilla checkpoint of a supported family into a DiJiang one.

    The family's weights stay bit for bit; every layer gets P drawn from the seed, analytic D1 and D2,
    W_G xavier_uniform with gain 2^-2.5, and a group norm of weight 1 and bias 0. Nothing of it is
    trained: fine-tune the result (D1 and D2 frozen) before its text makes sense.

    Args:
        vanilla: checkpoint folder as transformers saves it.
        output: folder to create, with its parents.
        seed: of P and W_G; the same seed gives the same bytes.
        progress: told about bytes written.

    Raises:
        CheckpointError: not a vanilla checkpoint of a supported family, config and weights that
            disagree, or an output that exists, cannot be written or does not fit on the disk.
    """
    source = Checkpoint(vanilla)
    family = family_of(source)
    spec = read_spec(family, source)
    if not is_vanilla(source):
        raise CheckpointError(
            f"{vanilla}: already a DiJiang checkpoint (it has proj_matrix tensors), expected a vanilla "
            "one; run dijiang export on it"
        )
    bindings = family.bindings(spec)
    wanted = shapes(bindings)
    # Names in the file may lack the family's prefix; the output always has it.
    stored = dict(zip(shapes(named_as_in(source, family, bindings)), wanted, strict=True))
    kept = {old: new for old, new in stored.items() if not new.endswith(ADDED)}
    check_tensors(source, {old: wanted[new] for old, new in kept.items()}, ignored_by(family, spec))
    added = {name: shape for name, shape in wanted.items() if name.endswith(ADDED)}
    find_tokenizer(source.path, spec.vocab_size)
    # What is new is like the layers, whatever the embedding is.
    dtype = source.dtype(next(old for old, new in kept.items() if IN_LAYER.search(new)))
    sizes = [math.prod(wanted[new]) * source.dtype(old).itemsize for old, new in kept.items()]
    write_checkpoint(
        Path(output),
        family.published_config({k: v for k, v in source.config.items() if k != "quantization_config"}),
        _tensors(source, kept, first_values(added, dtype, seed)),
        sum(sizes) + nbytes(added, dtype),
        files=[source.path / name for name in CARRIED if (source.path / name).is_file()],
        untrained=True,
        progress=progress,
    )
    return Conversion(
        Path(output),
        spec.family,
        kept=sum(math.prod(wanted[name]) for name in kept.values()),
        added=sum(math.prod(shape) for name, shape in added.items() if not is_decay_table(name)),
        notes=tuple(source.notes),
    )


def _tensors(
    source: Checkpoint, kept: dict[str, str], added: Iterator[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The kept tensors in the order of their files, then the new ones."""
    for old in source.shapes:
        if old in kept:
            yield kept[old], read_finite(source, old)
    yield from added
