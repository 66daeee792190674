"""The page about the time of a step, and the table of GPUs."""

from __future__ import annotations

import json
import math
from typing import Any

from markdown_parts import table

from dijiang.bench.render import header_lines, tables

from . import REPORTS

#: Share of a step from which on a kind of node has a row of its own.
SHOWN = 0.02
PERFORMANCE = """# Where a step's time goes

This page is made by `make steps` and `make docs`. Do not edit it.

`make steps` runs the shape of {preset} with random weights, batch 1. The bench times whole steps: the graphs of a
bundle take turns ([how to read it](benchmarks.md)). The time of the nodes comes from ONNX Runtime's profiler, which
adds some microseconds to each. So the sums are larger than the steps.

Choices that were made by measurement: the settings of a session ([ADR 0031](adr/0031-session-settings.md)), the
matmul ([ADR 0020](adr/0020-matmul.md)), one operator a layer ([ADR 0010](adr/0010-native-operator.md)).

## Whole steps

"""


def kinds(row: dict[str, Any]) -> str:
    """The kinds of nodes of one graph that take most of the time; others together."""
    total = math.fsum(kind["ms"] for kind in row["kinds"])
    shown = [kind for kind in row["kinds"] if kind["ms"] >= SHOWN * total]
    rest = [kind for kind in row["kinds"] if kind["ms"] < SHOWN * total]
    nodes, others = sum(kind["nodes"] for kind in rest), math.fsum(kind["ms"] for kind in rest)
    shown.append({"kind": "all others", "nodes": nodes, "ms": others})
    lines = [[k["kind"], str(k["nodes"]), f"{k['ms']:.2f}", f"{k['ms'] / total:.0%}"] for k in shown]
    tokens = f"{row['tokens']} token{'s' * (row['tokens'] != 1)}"
    return f"## {row['model']}, {tokens}\n\n{table(['kind', 'nodes', 'ms', 'share'], lines)}\n"


DRAFTS = """
## Drafts

`--speculate` feeds several tokens a call where the text repeats itself ([ADR 0034](adr/0034-drafts.md)). `make
speculation` times calls of pythia-410m's shape in the `native` graph. The texts are greedy: {written} tokens after
each of {prompts} prompts. The last columns are worked out of both: times as fast as one token a call.

Processor: {cpu}.

"""


def drafts() -> str:
    """The part about `--speculate`."""
    found = json.loads((REPORTS / "speculation.json").read_text(encoding="utf-8"))
    sizes = list(found["costs"][0]["calls"])
    costs = [[row["precision"], *(f"{row['calls'][size]:.1f}" for size in sizes)] for row in found["costs"]]
    gains = [
        [
            row["text"],
            str(row["draft"]),
            f"{row['tokens_a_call']:.2f}",
            f"{row['right']:.0%}",
            *(f"{row[cost['precision']]:.2f}" for cost in found["costs"]),
        ]
        for row in found["rows"]
    ]
    precisions = [cost["precision"] for cost in found["costs"]]
    head = DRAFTS.format(written=found["written"], prompts=found["prompts"], cpu=found["cpu"]["model"])
    timed = table(["ms a call of tokens", *sizes], costs)
    worked_out = table(["text", "draft at most", "tokens a call", "of drafts right", *precisions], gains)
    return f"{head}{timed}\n\n{worked_out}\n"


def performance() -> str:
    """The page about the steps of each graph."""
    found = json.loads((REPORTS / "steps.json").read_text(encoding="utf-8"))
    report = found["report"]
    header = "\n".join(f"- {line}" for line in header_lines(report))
    parts = ["\n\n".join([header, *tables(report)]) + "\n", *map(kinds, found["nodes"])]
    return PERFORMANCE.format(preset=found["preset"]) + "\n".join(parts) + drafts()


def gpus() -> str:
    """The table of `benchmarks/gpu.py`'s reports: steps of each model."""
    rows = []
    for file in sorted(REPORTS.glob("gpu-h200*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        bandwidth = report["results"]["bandwidth tiny-python fp16"]["bytes_per_second"]
        for found in report["results"].values():
            for one in found.get("results", []):
                latency = one["decode"]["latency"] if one["per_token"] is None else one["per_token"]["latency"]
                milliseconds = 1e3 * latency["p50"] / (one["tokens"] if one["per_token"] is None else 1)
                share, spread = "-", f"{one['spread']:.0%}"
                if one["roofline"]:
                    share = f"{one['roofline']['bytes_per_step'] / bandwidth / milliseconds * 1e3:.0%}"
                graph = one["session"].get("graph")
                step = [one["model"], f"`{graph}`" if graph else "-", f"{one['depth']:,}", f"{milliseconds:.3f}"]
                rows.append([*step, share, spread, report["gpu"]["name"]])
    return table(["model", "graph", "tokens before", "ms a token, p50", "of the bandwidth", "spread", "GPU"], rows)


def costs() -> str:
    """The table of `benchmarks/precisions.py`'s report: what each precision for GPUs costs the example."""
    report = json.loads((REPORTS / "precisions.json").read_text(encoding="utf-8"))
    rows = [
        [
            f"`{one['precision']} --target {one['target']}`",
            f"`{one['graph']}`",
            f"{one['rms_relative_error']:.1e}",
            f"{one['kl']:.1e}",
            f"{one['top1_agreement']:.2%}",
            f"{one['perplexity'] / one['reference_perplexity'] - 1:+.3%}",
        ]
        for one in report["rows"]
    ]
    heads = ["export", "graph", "RMS-relative error", "KL, nats", "top-1 agreement", "perplexity"]
    what = f"tiny-python, {report['tokens']:,} tokens of held-out text, against float64; {report['cpu']}.\n\n"
    return what + table(heads, rows)
