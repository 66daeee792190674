"""dijiang deploy."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..errors import ExportError
from . import model_folder

OUTPUT = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to be written."
)


@click.group()
def deploy() -> None:
    """Write a bundle as other runtimes read it."""


@deploy.command()
@model_folder("bundle")
@OUTPUT
def genai(bundle: Path, output: Path) -> None:
    """BUNDLE for the loop of onnxruntime-genai."""
    from ..bundle.opened import open_bundle
    from ..files import check_output, new_folder

    try:
        from ..integrations.genai import write
    except ImportError as error:
        raise ExportError(str(error)) from error
    opened = open_bundle(bundle)
    check_output(output, [bundle], ExportError)
    if os.path.lexists(output):
        raise ExportError(f"{output} exists and is never overwritten; choose another folder")
    with new_folder(output, ExportError) as partial:
        write(opened, partial)
    click.echo(output)
