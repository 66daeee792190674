"""dijiang state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bundle.sizes import cache_bytes_per_token
from ..runtime.options import Loading
from . import FILE, JSON, model_folder, options_of, print_json, print_table

if TYPE_CHECKING:
    from ..runtime.snapshot import Snapshot


@click.group()
def state() -> None:
    """Look into states that `dijiang run --save-state` wrote."""


@state.command()
@click.argument("file", type=FILE)
@JSON
def show(file: Path, as_json: bool) -> None:
    """Show what FILE holds; checks all of it."""
    facts = _facts(_load(file))
    if as_json:
        print_json(facts)
        return
    print_table([("file", str(file)), *((name.replace("_", " "), _plain(value)) for name, value in facts.items())])


@state.command()
@click.argument("file", type=FILE)
@model_folder("bundle")
@options_of(Loading)
def verify(file: Path, bundle: Path, **loading: Any) -> None:
    """Compute the logits that FILE keeps again, with BUNDLE; exit 1 if they differ."""
    from ..runtime.model import load
    from ..runtime.witness import verify as verified

    kept = _load(file)
    click.echo(verified(load(bundle, **loading), kept))


@state.command()
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@JSON
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Show how the states in two files differ."""
    import numpy as np

    from ..errors import InputError

    one, two = _load(first), _load(second)
    shapes = [[layer.shape for layer in kept.layers] for kept in (one, two)]
    if one.fingerprint != two.fingerprint or shapes[0] != shapes[1]:
        raise InputError(
            f"{second}: {len(two.position)} sequences of checkpoint {two.fingerprint[:12]}, {first} has "
            f"{len(one.position)} of {one.fingerprint[:12]}; compare states of one checkpoint and batch"
        )
    apart = [
        float(np.sqrt(((a - b) ** 2).mean() / max(float((a**2).mean()), 1e-30)))
        for a, b in zip(one.layers, two.layers, strict=True)
    ]
    facts = {
        "positions": [one.position.tolist(), two.position.tolist()],
        "same_tokens": bool((one.history == two.history).all()),
        "same_pending": one.seams == two.seams,
        "rms_relative_difference": apart,
        "equal": _digest_free(one) == _digest_free(two),
    }
    if as_json:
        print_json(facts)
        return
    print_table([(name.replace("_", " "), _plain(value)) for name, value in facts.items()])


def _load(file: Path) -> Snapshot:
    from ..runtime.snapshot import Snapshot

    return Snapshot.load(file)


def _facts(kept: Snapshot) -> dict[str, Any]:
    """What a snapshot says, JSON-ready."""
    batch, heads, channels, _ = kept.layers[0].shape
    a_token = cache_bytes_per_token(len(kept.layers), heads, channels)
    seams = [None if seam is None else seam.plain() for seam in kept.seams]
    return {
        "checkpoint": kept.fingerprint,
        "sequences": batch,
        "position": kept.position.tolist(),
        "history": [row.tobytes().hex() for row in kept.history],
        "state_bytes": sum(layer.nbytes for layer in kept.layers),
        "cache_bytes": a_token * int(kept.position.sum()),
        "pending": seams,
        "made": kept.note.made,
        "sampler": kept.note.sampler,
        "top": [list(pair) for pair in kept.note.top],
    }


def _digest_free(kept: Snapshot) -> tuple[bytes, ...]:
    """All that decides what follows, without the note."""
    arrays = (*kept.layers, kept.position, kept.last, kept.seen, kept.history)
    return (*(array.tobytes() for array in arrays), repr(kept.seams).encode())


def _plain(value: Any) -> str:
    """A value for a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items()) or "unknown"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
