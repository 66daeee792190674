"""dijiang run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from . import BUNDLE, GRAPH, JSON, PROVIDER, THREADS

#: Options of `run` that say how the bundle is loaded; the others say how text is generated.
LOADING = ("provider", "graph", "threads", "cuda_graph")


@click.command()
@BUNDLE
@click.option("-p", "--prompt", help="Text to continue; default: standard input.")
@click.option("-n", "--max-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the most likely token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0: off.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, help="Default: a new one each time.")
@click.option("--stop", multiple=True, help="Text that ends the output; may be given several times.")
@click.option("--stop-token", "stop_tokens", type=int, multiple=True, help="Token id that ends it.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's own end token.")
@PROVIDER
@GRAPH
@click.option(
    "--cuda-graph/--no-cuda-graph",
    default=None,
    help="Replay decode steps as CUDA graphs; default: where they are proven equal.",
)
@THREADS
@click.option("-v", "--verbose", is_flag=True, help="Say which graph runs, and on what.")
@JSON
def run(bundle: Path, prompt: str | None, verbose: bool, as_json: bool, **options: Any) -> None:
    """Generate text from BUNDLE."""
    from ..runtime.model import load

    loading = {name: options.pop(name) for name in LOADING}
    model = load(bundle, **loading)
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
