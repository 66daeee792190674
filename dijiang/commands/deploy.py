"""dijiang deploy."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from ..errors import ExportError
from . import FILE, model_folder

LINK = click.option(
    "--link", is_flag=True, help="Weights as hard links: no second copy, which onnx refuses to read."
)
OUTPUT = click.option("-o", "--output", required=True, type=FILE, help="Folder to be written.")

#: Of Triton's configuration, whose numbers have 32 bits.
MANY = click.IntRange(1, 2**31 - 1)


@click.group()
def deploy() -> None:
    """Write a bundle as other runtimes read it."""


@deploy.command()
@model_folder("bundle")
@OUTPUT
@LINK
def genai(bundle: Path, output: Path, link: bool) -> None:
    """BUNDLE for the loop of onnxruntime-genai."""
    written(bundle, output, "genai", link=link)


@deploy.command()
@model_folder("bundle")
@OUTPUT
@click.option("--name", default="dijiang", show_default=True, help="Of the model.")
@click.option("--batch", type=MANY, default=16, show_default=True, help="Sequences a step at most.")
@click.option("--candidates", type=MANY, default=256, show_default=True, help="States kept at most.")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "python"]),
    default="onnxruntime",
    show_default=True,
    help="What runs it: Triton's onnxruntime, or dijiang in the server's Python.",
)
@LINK
def triton(bundle: Path, output: Path, **options: Any) -> None:
    """BUNDLE as a model repository of Triton Inference Server."""
    written(bundle, output, "triton", **options)


def written(bundle: Path, output: Path, integration: str, **options: Any) -> None:
    """Have an integration write a new folder, whole or not at all."""
    from ..bundle.opened import open_bundle
    from ..files import check_new, new_folder

    module = import_module(f"dijiang.integrations.{integration}")
    opened = open_bundle(bundle)
    check_new(output, [bundle], ExportError)
    with new_folder(output, ExportError) as partial:
        notes = module.write(opened, partial, **options)
    for note in notes:
        click.echo(note, err=True)
    click.echo(output)
