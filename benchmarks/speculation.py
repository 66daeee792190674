"""Whether drafts from the text so far would pay: make speculation.

    python benchmarks/speculation.py CACHE_FOLDER REAL_FOLDER -o REPORT.json

Drafts are looked up in the text so far: `dijiang.runtime.drafts`. Two things decide, and both are measured:

- what calls of few tokens cost beside one of one token: Pythia-410M in int8 and int4;
- how many tokens of a draft are right: greedy text of two models that were trained. tiny-python writes code from
  code, the vanilla SmolLM2-135M-Instruct writes from code and from English.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from bundles import Place
from real import english, fetch, run

import dijiang
from dijiang.machine.describe import describe_cpu
from dijiang.runtime.drafts import WAITING, Lookup
from dijiang.runtime.model import Model

#: Tokens of a draft at most.
DRAFTS = (1, 2, 4, 8, 16)
#: Tokens of the calls that are timed.
SIZES = (1, 2, 3, 4, 6, 8, 12, 17, 25)
#: Prompts of a text, their tokens, and the tokens that are written.
PROMPTS, PROMPT, WRITTEN = 10, 256, 128
REPEATS = 40
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-python"


@dataclass(frozen=True)
class Call:
    """One call: tokens that are fed, those of them that are a draft, and how many of these were right."""

    fed: int
    drafted: int
    right: int


def replay(prompt: Sequence[int], written: Sequence[int], longest: int) -> list[Call]:
    """The calls of a greedy text, had it been written with drafts."""
    calls, at, waiting, lookup = [], 0, 1, Lookup(prompt)
    while at < len(written):
        proposed = lookup.draft(longest) if waiting <= WAITING else []
        right = 0
        while right < len(proposed) and at + right < len(written) and proposed[right] == written[at + right]:
            right += 1
        calls.append(Call(waiting + len(proposed), len(proposed), right))
        lookup.add(written[at : at + right + 1])
        at += right + 1
        waiting = 1 if right == len(proposed) else waiting + right + 1
    return calls


def milliseconds(model: Model, count: int) -> float:
    """Median time of a call of so many tokens, with logits of each."""
    state, times = model.new_state(), []
    ids = np.arange(1, count + 1)[None]
    for _ in range(REPEATS + 3):
        start = time.perf_counter()
        model.forward(ids, state, all_logits=True)
        times.append(time.perf_counter() - start)
    return float(np.median(times[3:])) * 1e3


def costs(cache: Path, precision: str) -> dict[str, Any]:
    """Milliseconds of calls by their tokens."""
    model = dijiang.load(Place(cache, "pythia-410m", precision, "cpu").bundle, graph="native", check_hashes=False)
    calls = {count: milliseconds(model, count) for count in SIZES}
    return {"precision": precision, "calls": calls}


def gain(calls: list[Call], cost: dict[str, Any]) -> float:
    """Times as fast as one token a call, by what calls cost; sizes between the measured ones are interpolated."""
    times = [cost["calls"][size] for size in SIZES]
    spent = sum(float(np.interp(call.fed, SIZES, times)) for call in calls)
    return sum(call.right + 1 for call in calls) * times[0] / spent


def texts(work: Path) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Prompts and greedy continuations, by the kind of text."""
    import inspect

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code = "\n".join(inspect.getsource(module) for module in (json.decoder, json.encoder, inspect))
    bundle = work / "tiny-python"
    if not bundle.exists():
        run("export", EXAMPLE, "-o", bundle)
    tiny = dijiang.load(bundle)
    ids, rows = tiny.tokenizer.encode(code), []
    for i in range(PROMPTS):
        part = ids[i * 700 : i * 700 + PROMPT]
        rows.append((part, [r.token for r in tiny.generate(part, max_tokens=WRITTEN, ignore_eos=True)]))
    found = {"tiny-python, code": rows}
    folder = fetch(work)
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for kind, text in (("code", code), ("English", english(work).read_text(encoding="utf-8"))):
        ids, rows = words(text).input_ids, []
        for i in range(PROMPTS):
            part = ids[i * 1000 : i * 1000 + PROMPT]
            with torch.no_grad():
                whole = model.generate(
                    torch.tensor([part]), max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False
                )
            rows.append((part, whole[0, PROMPT:].tolist()))
        found[f"SmolLM2-135M, {kind}"] = rows
    return found


@click.command()
@click.argument("cache", type=click.Path(file_okay=False, path_type=Path))
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(cache: Path, work: Path, output: Path) -> None:
    """Measure calls, write texts, and work out what drafts would gain."""
    measured = [costs(cache, precision) for precision in ("int8", "int4")]
    rows = []
    for kind, pairs in texts(work).items():
        for longest in DRAFTS:
            calls = [call for prompt, written in pairs for call in replay(prompt, written, longest)]
            rows.append(
                {
                    "text": kind,
                    "draft": longest,
                    "tokens_a_call": 1 + sum(call.right for call in calls) / len(calls),
                    "right": sum(call.right for call in calls) / max(1, sum(call.drafted for call in calls)),
                    **{cost["precision"]: gain(calls, cost) for cost in measured},
                }
            )
            click.echo(json.dumps(rows[-1]))
    found = {
        "cpu": describe_cpu(Path("/")),
        "prompts": PROMPTS,
        "written": WRITTEN,
        "costs": measured,
        "rows": rows,
    }
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
