"""dijiang build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..recipe import AUTO
from ..runtime.sessions.engines import BACKENDS
from . import BUNDLE, JSON
from .inspect import show_bundle


@click.command()
@BUNDLE
@click.option(
    "--backend",
    type=click.Choice([AUTO, *BACKENDS]),
    default=AUTO,
    show_default=True,
    help="auto: the first that is installed.",
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    help="Compute capability, as in sm86; several times for one engine that runs on all. "
    "Default: the GPU of this machine; only tensorrt_rtx builds for others.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences a call at most.")
@click.option("--longest", type=click.IntRange(1), default=256, show_default=True, help="Tokens a call at most.")
@JSON
def build(bundle: Path, as_json: bool, **options: Any) -> None:
    """Build a TensorRT engine into BUNDLE, exported with --target tensorrt."""
    from ..exporter.engine import build as compile_engine

    show_bundle(compile_engine(bundle, **options), as_json)
