"""dijiang run."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..runtime.options import Generation, Loading
from . import JSON, model_folder, options_of


@click.command()
@model_folder("bundle")
@click.option("-p", "--prompt", help="Text to continue; default: standard input.")
@options_of(Generation, Loading)
@click.option("-v", "--verbose", is_flag=True, help="Say which graph runs, and on what.")
@JSON
def run(bundle: Path, prompt: str | None, verbose: bool, as_json: bool, **options: Any) -> None:
    """Generate text from BUNDLE."""
    from ..runtime.model import load

    loading = {one.name: options.pop(one.name) for one in fields(Loading)}
    model = load(bundle, say=lambda text: click.echo(f"[{text}]", err=True), **loading)
    if verbose:
        click.echo(f"[{model.graph} graph on {model.provider}]", err=True)
    if prompt is None and sys.stdin.isatty():
        click.echo("[type the text to continue, then Ctrl-D]", err=True)
    text = []
    for record in model.generate(sys.stdin.read() if prompt is None else prompt, **options):
        text.append(record.text)
        if not as_json:
            click.echo(record.text, nl=False)
            sys.stdout.flush()
    if as_json:
        last = {name: value for name, value in vars(record).items() if name not in ("text", "token")}
        click.echo(json.dumps({"text": "".join(text), **last}))
        return
    detail = f" ({record.detail})" if record.detail else ""
    click.echo()
    click.echo(
        f"[{record.prompt_tokens} + {record.generated} tokens, "
        f"prefill {record.prefill_rate:,.0f} tokens/s, decode {record.decode_rate:,.0f} tokens/s, "
        f"finish: {record.finish_reason}{detail}]",
        err=True,
    )
