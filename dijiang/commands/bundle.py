"""What a bundle holds, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from . import print_table

if TYPE_CHECKING:
    from ..bundle.manifest import Bundle


def show_bundle(bundle: Bundle, as_json: bool) -> None:
    """Print it on stdout."""
    from ..bundle.sizes import sizes

    manifest, spec, found = bundle.manifest, bundle.manifest.spec, sizes(bundle)
    if as_json:
        click.echo(
            json.dumps(
                json.loads(manifest.to_json())
                | {"bytes": bundle.nbytes, "path": str(bundle.path), "sizes": asdict(found)}
            )
        )
        return
    limit = manifest.positions_limit
    parity = bundle.parity
    print_table(
        [
            ("bundle", str(bundle.path)),
            (
                "model",
                f"{spec.family}, {spec.num_layers} layers of {spec.hidden_size}, {spec.num_heads} heads",
            ),
            ("vocabulary", f"{spec.vocab_size:,}"),
            ("graph", f"{manifest.dialect}, {manifest.precision}"),
            ("parameters", f"{found.parameters:,}"),
            ("size", f"{bundle.nbytes / 1e6:,.1f} MB"),
            ("state", f"{spec.state_bytes / 1e6:,.3f} MB a sequence, at any length"),
            ("memory", f"{found.memory_bytes / 1e6:,.1f} MB: weights and one state, at any length"),
            (
                "against a cache",
                f"a vanilla fp16 cache of this shape is larger from {found.cache_larger_from:,} "
                "tokens on: "
                + ", ".join(f"{b / 1e6:,.1f} MB at {n:,}" for n, b in found.cache_bytes.items()),
            ),
            ("positions", "no end" if limit is None else f"{limit}: {manifest.limit_reason}"),
            ("decay", manifest.decay),
            ("parity", "not verified" if parity is None else "passed" if parity["passed"] else "FAILED"),
            *(("warning", text) for text in manifest.warnings),
            *(
                ("engine", f"{name} {e['version']} for {', '.join(e['gpus'])}, batch {e['batch']}")
                for name, e in manifest.engines.items()
            ),
            ("written by", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())),
        ]
    )
