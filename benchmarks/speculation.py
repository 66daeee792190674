"""Whether drafts from the text so far would pay: make speculation.

    python benchmarks/speculation.py CACHE_FOLDER REAL_FOLDER -o REPORT.json

Prompt lookup (the continuation of the last time that the final tokens stood in the text) needs no second model. A draft
of k tokens costs one call of k + 1 tokens; where not all of it is right, the state is put back and what was right
is fed again. Two things decide, and both are measured:

- what calls of few tokens cost beside one of one token, and a copy of the state: Pythia-410M in int8 and int4;
- how many tokens of a draft are right: greedy text of two models that were trained. tiny-python writes code from
  code, the vanilla SmolLM2-135M-Instruct writes from code and from English.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from bundles import Place
from real import english, fetch, run

import dijiang
from dijiang.machine.describe import describe_cpu
from dijiang.runtime.model import Model

#: Final tokens that are looked up, the most first; tokens of a draft.
MATCHED, DRAFTS = (3, 2), (1, 2, 4, 8)
#: Prompts of a text, their tokens, and the tokens that are written.
PROMPTS, PROMPT, WRITTEN = 10, 256, 128
REPEATS = 40
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-python"


def draft(ids: Sequence[int], longest: int) -> list[int]:
    """What followed the last earlier place of the final tokens: at most `longest` tokens, or none."""
    for matched in MATCHED:
        end = list(ids[-matched:])
        for start in range(len(ids) - matched - 1, -1, -1):
            if list(ids[start : start + matched]) == end:
                return list(ids[start + matched : start + matched + longest])
    return []


def replay(prompt: Sequence[int], written: Sequence[int], longest: int) -> list[tuple[int, int]]:
    """Greedy text, had it been written with drafts: (tokens of a draft, how many were right) of each call."""
    calls, at = [], 0
    while at < len(written):
        proposed = draft([*prompt, *written[:at]], longest)
        right = 0
        while right < len(proposed) and at + right < len(written) and proposed[right] == written[at + right]:
            right += 1
        calls.append((len(proposed), right))
        at += right + 1
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
    """Milliseconds of calls by their tokens, and of a copy of the state."""
    model = dijiang.load(Place(cache, "pythia-410m", precision, "cpu").bundle, graph="native", check_hashes=False)
    state, copies = model.new_state(), []
    model.forward(np.array([[1]]), state)
    for _ in range(REPEATS):
        start = time.perf_counter()
        state.clone()
        copies.append(time.perf_counter() - start)
    calls = {count: milliseconds(model, count) for count in sorted({1, *DRAFTS, *(k + 1 for k in DRAFTS)})}
    return {"precision": precision, "calls": calls, "copy": float(np.median(copies)) * 1e3}


def gain(calls: list[tuple[int, int]], cost: dict[str, Any]) -> float:
    """Times as fast as one token a call, by what calls cost; sizes between the measured ones are interpolated."""
    sizes = sorted(cost["calls"])

    def call(tokens: int) -> float:
        return float(np.interp(tokens, sizes, [cost["calls"][size] for size in sizes]))

    spent = 0.0
    for proposed, right in calls:
        spent += call(1 + proposed) + (cost["copy"] if proposed else 0)
        if right < proposed:
            spent += call(1 + right)  # put back, and fed again
    return sum(right + 1 for _, right in calls) * call(1) / spent


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
            written = sum(right + 1 for _, right in calls)
            rows.append(
                {
                    "text": kind,
                    "draft": longest,
                    "tokens_a_call": written / len(calls),
                    "right": sum(right for _, right in calls) / max(1, sum(proposed for proposed, _ in calls)),
                    **{cost["precision"]: gain(calls, cost) for cost in measured},
                }
            )
            click.echo(json.dumps(rows[-1]))
    found = {"cpu": describe_cpu(Path("/")), "costs": measured, "rows": rows}
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
