"""dijiang run."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from ..files import check_file
from ..progress import bars
from ..runtime.options import Generation, Loading
from . import (
    BYTE_ORDER_MARK,
    FILE,
    JSON,
    given_options,
    model_folder,
    options_of,
    print_json,
    refuse_given,
    say,
    say_idle,
    spoken,
    taken,
)

if TYPE_CHECKING:
    from ..runtime.model import Model
    from ..runtime.snapshot import Snapshot


@click.command()
@model_folder("bundle")
@click.option("-p", "--prompt", help="Text to continue; default: standard input, with --load-state none.")
@click.option(
    "--jsonl",
    type=FILE,
    help='Answer each line of this file, {"prompt": ..., options}, together; a job that was killed goes on.',
)
@click.option("-o", "--output", type=FILE, help="Of --jsonl: one line an answer, in order.")
@click.option("--save-state", type=FILE, help="Keep the state at the end in this file.")
@click.option(
    "--load-state",
    type=FILE,
    help="Go on from a saved state, with its way to draw tokens where no option changes it.",
)
@options_of(Generation, Loading)
@click.option("-v", "--verbose", is_flag=True, help="Say which graph runs, and on what.")
@JSON
def run(
    bundle: Path,
    prompt: str | None,
    jsonl: Path | None,
    output: Path | None,
    save_state: Path | None,
    load_state: Path | None,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text from BUNDLE.

    A line of --jsonl is an object: `prompt`, as text or token ids, and options by their Python names, as
    `max_tokens`. Its answer has `index`, `input` (a hash of the line), `job` (a hash of the weights and the other
    options), `text`, `finish_reason`, `prompt_tokens` and `generated`; or `error` after the first three.

    It ends by `stop` (an end token or a stop text), `limit` (--max-tokens) or `length` (the model has no more
    positions).
    """
    from ..runtime.model import load
    from ..runtime.snapshot import Snapshot
    from ..runtime.witness import resumed, take

    if (jsonl is None) is not (output is None):
        raise click.UsageError("--jsonl and -o go together")
    if jsonl is not None:
        refuse_given(("prompt", "save_state", "load_state", "as_json", "speculate"), "beside --jsonl")
    if save_state is not None:
        check_file(save_state, InputError)
    loading = taken(Loading, options)
    kept = None if load_state is None else Snapshot.load(load_state)
    model = load(bundle, say=say, **loading)
    if verbose:
        say(f"{model.graph} graph on {model.provider}")
    if jsonl is not None and output is not None:
        _answer_file(model, jsonl, output, Generation.of(options))
        return
    if kept is not None:
        options |= _continued(kept, model) | given_options(options)
    elif prompt is None:
        if sys.stdin.isatty():
            say("type the text to continue, then Ctrl-D")
        prompt = sys.stdin.read().removeprefix(BYTE_ORDER_MARK)
    chosen = Generation.of(options)
    say_idle(chosen)
    if save_state is not None:
        chosen = chosen.seeded()
    state = model.new_state() if save_state is not None else None
    if kept is not None:
        state = resumed(model, kept)
    text = []
    with bars(counts=True) as progress:  # of a long prompt; text follows it
        records = model.generate(prompt, state=state, progress=progress, **vars(chosen))
        first = next(records)
    for record in chain([first], records):
        text.append(record.text)
        if not as_json:
            click.echo(spoken(record.text), nl=False)
            sys.stdout.flush()
    if not as_json:
        click.echo()  # what follows may be an error
    if save_state is not None and state is not None:
        take(model, state, chosen).save(save_state)
    if as_json:
        last = {name: value for name, value in vars(record).items() if name not in ("text", "token")}
        print_json({"text": "".join(text), **last})
        return
    detail = f" ({record.detail})" if record.detail else ""
    say(
        f"{record.prompt_tokens} + {record.generated} tokens, "
        f"prefill {record.prefill_rate:,.0f} tokens/s, decode {record.decode_rate:,.0f} tokens/s, "
        f"finish: {record.finish_reason}{detail}"
    )


def _answer_file(model: Model, source: Path, output: Path, options: Generation) -> None:
    """Answer all lines of a file; exit 1 if some failed."""
    from ..batching.jobs import answer_file

    before: int | None = None
    with bars(counts=True) as progress:

        def told(done: int, total: int) -> None:
            nonlocal before
            if before is None and done:
                say(f"{output}: {done} of {total} prompts are answered; remove it to answer them anew")
            before = done
            progress("prompts", done, total)

        failed = answer_file(model, source, output, options, progress=told)
    if failed:
        raise InputError(f"{output}: {failed} prompts failed; look for error in its lines")


def _continued(kept: Snapshot, model: Model) -> dict[str, Any]:
    """Options that a snapshot was drawn by. Says what else than the state's maker goes on."""
    from ..runtime.witness import NOTED, made_by

    made, here = kept.note.made, made_by(model)
    changed = [f"{name} {made[name]} -> {value}" for name, value in here.items() if made.get(name, value) != value]
    if changed:
        say(f"the state goes on elsewhere: {', '.join(changed)}")
    return {name: value for name, value in kept.note.sampler.items() if name in NOTED}
