"""dijiang upgrade."""

from __future__ import annotations

from pathlib import Path

import click

from . import BUNDLE, JSON
from .inspect import show_bundle


@click.command()
@BUNDLE
@JSON
def upgrade(bundle: Path, as_json: bool) -> None:
    """Turn BUNDLE, of an older format, into the format of this dijiang; its checkpoint is not needed."""
    from ..bundle.upgrade import upgrade as rewrite

    show_bundle(rewrite(bundle), as_json)
