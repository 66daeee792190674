"""dijiang sign."""

from __future__ import annotations

from pathlib import Path

import click

from . import BUNDLE, FILE, JSON
from .inspect import show_bundle


@click.command()
@BUNDLE
@click.option("--key", type=FILE, required=True, help="Of OpenSSH: private, or in the agent.")
@JSON
def sign(bundle: Path, key: Path, as_json: bool) -> None:
    """Sign BUNDLE, after its files were compared with their hashes; a signature that it has is replaced."""
    from ..bundle.opened import open_any

    show_bundle(open_any(bundle, None).signed(key), as_json)
