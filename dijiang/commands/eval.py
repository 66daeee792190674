"""dijiang eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import EvalError
from ..runtime.options import Loading
from . import JSON, model_folder, options_of, print_json


@click.command("eval")
@model_folder("bundle")
@click.option("--tasks", required=True, help="Names of lm-evaluation-harness, between commas.")
@click.option(
    "--include",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with further tasks.",
)
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before a question; default: the task's.")
@click.option("--limit", type=click.IntRange(1), help="Questions of each task at most.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Texts scored together.")
@click.option("--max-length", type=click.IntRange(1), help="Tokens of a window; default: those of the training.")
@options_of(Loading)
@JSON
def evaluate(bundle: Path, tasks: str, as_json: bool, **options: Any) -> None:
    """Evaluate BUNDLE on tasks of lm-evaluation-harness."""
    try:
        from ..integrations import lm_eval
    except ImportError as error:
        raise EvalError(str(error)) from error
    results, table = lm_eval.evaluate(bundle, [one.strip() for one in tasks.split(",")], **options)
    if as_json:
        print_json(results)
    else:
        click.echo(table)
