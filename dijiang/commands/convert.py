"""dijiang convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import FILE, JSON, PROGRESS, model_folder, print_json, print_table


@click.command()
@model_folder("vanilla")
@click.option("-o", "--output", type=FILE, required=True, help="New folder.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@PROGRESS
@JSON
def convert(vanilla: Path, output: Path, as_json: bool, progress: bool | None, **options: Any) -> None:
    """Turn a vanilla GPT-NeoX, OPT or LLaMA checkpoint into a DiJiang one, to be fine-tuned."""
    from ..models.convert import NEXT
    from ..models.convert import convert as write
    from ..progress import bars

    with bars(progress) as shown:
        done = write(vanilla, output, progress=shown, **options)
    if as_json:
        print_json(vars(done) | {"path": str(done.path), "next": NEXT})
        return
    print_table(
        [
            ("checkpoint", str(done.path)),
            ("family", done.family),
            ("parameters kept", f"{done.kept:,}"),
            ("parameters added", f"{done.added:,}, untrained"),
            *(("note", text) for text in done.notes),
            ("next", NEXT),
        ]
    )
