"""dijiang init."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import FILE, JSON, PROGRESS, console, print_json, refuse_given

if TYPE_CHECKING:
    from ..models.presets import Size


@click.command()
@click.argument("preset", required=False)
@click.option("-o", "--output", type=FILE, help="New folder.")
@click.option("--dtype", default="float16", show_default=True, help="float32, float16 or bfloat16.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option("--list", "listed", is_flag=True, help="Show the presets and what they weigh.")
@PROGRESS
@JSON
def init(
    preset: str | None, output: Path | None, listed: bool, as_json: bool, progress: bool | None, **options: Any
) -> None:
    """Write a checkpoint of a published shape with random weights, to size a device."""
    from ..models.initial import init as write
    from ..models.presets import PRESETS, size
    from ..progress import bars

    if listed:
        refuse_given(("preset", "output", *options), "beside --list")
        _show([size(name) for name in PRESETS], as_json)
        return
    if preset is None or output is None:
        raise click.UsageError("give a PRESET and --output, or --list")
    with bars(progress) as shown:
        write(preset, output, progress=shown, **options)
    if as_json:
        print_json(vars(size(preset)) | {"path": str(output)})
    else:
        click.echo(f"{output}: {preset} with random weights; next: dijiang export {output} -o BUNDLE")


def _show(sizes: list[Size], as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        print_json([vars(size) for size in sizes])
        return
    precisions = list(sizes[0].weight_bytes)
    table = Table("preset", "parameters", "state", *precisions, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for size in sizes:
        weights = (f"{size.weight_bytes[p] / 1e6:,.0f} MB" for p in precisions)
        table.add_row(size.preset, f"{size.parameters / 1e6:,.0f} M", f"{size.state_bytes / 1e6:,.1f} MB", *weights)
    console().print(table)
