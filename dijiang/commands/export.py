"""dijiang export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..recipe import GRAPHS, HEADS, PRECISIONS, TARGETS
from . import FILE, JSON, PROGRESS, TEXT, model_folder, refuse_given, row_option, threads_option
from .inspect import show_bundle


@click.command()
@model_folder("checkpoint")
@click.option("-o", "--output", type=FILE, required=True, help="Bundle folder.")
@row_option("--precision", rows=PRECISIONS, default="fp32")
@click.option("--head-precision", type=click.Choice(list(HEADS)), help="Default: 8 bits if quantized.")
@click.option("--block-size", type=int, help="Input channels that share a scale; default: 64.")
@click.option(
    "--calibration-tokens",
    type=click.IntRange(0),
    help="Of the text that int8 and int4 are rounded by; 0: to the nearest. Default: by the size of the model.",
)
@click.option(
    "--calibration-text",
    type=FILE,
    help="UTF-8 file that these tokens are read from. Default: text that the model writes.",
)
@click.option(
    "--budget",
    type=float,
    metavar="MB",
    help="Size that the weights of int4 may have: the projections that lose most by 4 bits keep 8.",
)
@row_option(
    "--graph",
    "--dialect",
    rows=GRAPHS,
    default="auto",
    extra="those of the target that run here and share all weights; else only this one",
)
@row_option("--target", rows=TARGETS, default="onnxruntime")
@click.option(
    "--decay",
    type=click.Choice(["exact", "analytic"]),
    default="exact",
    show_default=True,
    help="analytic drops trained D1/D2 tables, and with them the position limit.",
)
@click.option("--repair-decay", is_flag=True, help="Key scale 1 where a trained D2 was lost to overflow.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare with CHECKPOINT in float64, and keep the bundle only if it passes.",
)
@TEXT
@click.option("--sign", type=FILE, help="Key of OpenSSH to sign the bundle with.")
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@PROGRESS
@threads_option("Of the verification. Default: all cores it may use.")
@JSON
def export(checkpoint: Path, output: Path, as_json: bool, progress: bool | None, **options: Any) -> None:
    """Write the step graphs of CHECKPOINT as a bundle."""
    from ..exporter.export import export as write
    from ..progress import bars

    if not options["verify"]:
        refuse_given(("threads",), "beside --no-verify")
    with bars(progress) as report:
        bundle = write(checkpoint, output, progress=report, **options)
    show_bundle(bundle, as_json)
