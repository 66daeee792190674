"""The page about what rounding costs, and what a budget buys."""

from __future__ import annotations

import json

from markdown_parts import table

from . import REPORTS

ROUNDING = """# What rounding costs a real model

This page is made by `make rounding` and `make docs`. Do not edit it.

`make rounding` takes the weights of SmolLM2-135M-Instruct from the package `{package}`, as they were trained: the
vanilla Transformer. It is written in the graph that `dijiang bench` compares with, by the writer, the passes and
the schemes of a bundle. Each row is compared with float32 on {tokens} tokens of English, the head included. The
second moments of GPTQ come from {calibration} other tokens of the same text. The weights lie on a 4-bit grid of
their own. For the rows in 4 bits noise of one step of the grid was added first, on both sides of the comparison.
The rows of llama.cpp are types of its own for the same weights, judged on the same tokens; their bytes are those of
all tensors.

Activations are rounded to 8 bits in the same blocks. The head has 8 bits everywhere. The embedding is tied. It is
stored once where 576 channels are whole blocks. Scales are bfloat16 where a row says so, as by default
([ADR 0039](adr/0039-brief-scales.md)), else float32.

Processor: {cpu}.

"""


def rounding() -> str:
    """The page about ways of rounding."""
    found = json.loads((REPORTS / "rounding.json").read_text(encoding="utf-8"))
    lines = [
        [
            row["case"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['perplexity_change']:+.2%}",
            f"{row['kl']:.1e}",
            f"{row['top1_agreement']:.2%}",
            f"{row['seconds']:.0f}",
        ]
        for row in found["cases"]
    ]
    head = ROUNDING.format(
        package=found["package"],
        tokens=f"{found['tokens']:,}",
        calibration=f"{found['calibration']:,}",
        cpu=found["cpu"]["model"],
    )
    heads = ["weights", "MB that a step reads", "perplexity", "KL, nats", "top-1", "seconds to round"]
    return head + table(heads, lines) + "\n" + budgets()


BUDGETS = """
## What a budget buys

`make budget` spends `dijiang export --precision int4 --budget` on the model above, in 4 bits, and on the shipped
tiny-python, each judged on {tokens} tokens. A budget is so much more than plain int4 takes. *Measured* is what
`export` does ([how](adr/0038-budget.md)). The other rows spend as many bytes on other projections. The moments of
tiny-python come from text that it writes. Scales were float32.

"""


def budgets() -> str:
    """The table of budgets."""
    found = json.loads((REPORTS / "budget.json").read_text(encoding="utf-8"))
    lines = [
        [
            row["model"],
            row["way"],
            str(row["kept"]),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['perplexity_change']:+.2%}",
            f"{row['kl']:.2e}",
            f"{row['top1_agreement']:.2%}",
        ]
        for row in found["rows"]
    ]
    heads = ["model", "int4", "projections in 8 bits", "MB of weights", "perplexity", "KL, nats", "top-1"]
    return BUDGETS.format(tokens=f"{found['tokens']:,}") + table(heads, lines) + "\n"
