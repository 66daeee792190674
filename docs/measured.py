"""Pages from the reports of measurements, in benchmarks/results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from markdown_parts import table
from pictures import line_plot

from dijiang.bench.render import header_lines, tables

REPORTS = Path(__file__).parent.parent / "benchmarks" / "results"
#: Share of a step from which on a kind of node has a row of its own.
SHOWN = 0.02
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


CAPACITY = """# How many nodes

This page is made by `make capacity` and `make docs`. Do not edit it.

A state has {state} in a file, whatever was said before. A KV cache of the same shape has {each} for each token.
What that means for {nodes} nodes and {conversations} conversations is simulated. The parts: steps that were
measured, a model of nodes in SimPy (`benchmarks/capacity_model.py`), and a check of the model against two
replicas in Ray Serve on one machine.

Model: the shape of {model}, random weights. Processor: {cpu}. A node of the simulation is such a machine, with
two cores and {slots} slots. A step of one row takes {step:.1f} ms, one of {slots} rows {full:.1f} ms; a prompt
goes in at {prompt:,.0f} tokens/s.

## The model against two replicas

Clients ask both replicas through Ray's proxy; each asks again at once. Replicas, proxy and clients share two
cores. The first line says what the server adds to a row of a step and to a request: {added:.1f} ms, {hop:.0f}
ms. The other lines are predicted. Rates and times between tokens are the model's strong side. It does not know
that a request waits for the same cores as the steps: at middle loads its times to the first token are too short.

"""
WAYS = """
## {conversations} conversations

A turn is a question of {question} tokens and an answer of {answer} on average. Between two turns somebody
thinks for {think:.0f} s. A conversation has {turns:.0f} turns on average, after {system} tokens that every node
has kept. That is what keeps {nodes} nodes busy for three quarters of the time where the state is sent along. Each
other way has as many nodes as it keeps equally busy. A node keeps {memory:.0f} GB between turns, the network
carries {link:.2f} GB/s a node. At {death:.0f} s one node of {one_of:.0f} dies, with all that it keeps. It is back
after {back:.0f} s.

"""
NOTES = """
- *first*: seconds to the first token, before nodes die. *after*: for questions that are asked while they are
  away. *rows*: that a step has on average. *token*: of an answer.
- *moved*: over the network, for the whole cluster. A state that is sent along is sealed text, there and back.
  *kept*: for all conversations, before the deaths. *fed again*: tokens of the past in each turn.
- The cache is float16. Its steps take as long as ours and the time to read it from memory at the measured
  bandwidth. Feeding a prompt costs no more at a large depth. Both favour the cache.
- What the model leaves out: time to load a model, Ray's own limits, clients that are near to some nodes.

![Time to the first token](capacity-first.svg)

![Memory of all conversations](capacity-memory.svg)
"""


def capacity() -> str:
    """The page about many nodes."""
    found = json.loads((REPORTS / "capacity.json").read_text(encoding="utf-8"))
    measured, simulated = found["measured"], found["simulated"]
    load, node, pair = simulated["load"], measured["node"], measured["pair"]
    first = found["check"][0]["measured"]
    slots = max(map(int, node["steps"]))
    head = CAPACITY.format(
        state=f"{measured['snapshot_bytes'] / 1e6:.2f} MB",
        each=f"{measured['cache_bytes_per_token'] / 1e3:.1f} kB",
        nodes=f"{simulated['nodes']:,}",
        conversations=f"{simulated['conversations']:,}",
        model=measured["model"],
        cpu=measured["cpu"],
        slots=slots,
        step=1e3 * node["steps"]["1"],
        full=1e3 * node["steps"][str(slots)],
        prompt=1 / node["prompt"],
        added=1e3 * (first["token_p50"] - pair["steps"]["1"]),
        hop=1e3 * found["check"][0]["hop"],
    )
    heads = [
        "clients",
        "tokens/s",
        "model",
        "first token, p50, ms",
        "model",
        "p95",
        "model",
        "a token, p50, ms",
        "model",
    ]
    lines = []
    for row in found["check"]:
        line = [str(row["clients"])]
        for name, scale in (("tokens_per_second", 1), ("first_p50", 1e3), ("first_p95", 1e3), ("token_p50", 1e3)):
            line += [f"{scale * row[side][name]:.0f}" for side in ("measured", "model")]
        lines.append(line)
    about = WAYS.format(
        **{name: f"{simulated[name]:,}" for name in ("nodes", "conversations")},
        **load,
        memory=simulated["memory"] / 1e9,
        link=simulated["link"] / 1e9,
        one_of=1 / simulated["dying"],
        death=simulated["death"],
        back=simulated["back"],
    )
    names = [
        "way",
        "nodes",
        "rows",
        "first p50, s",
        "p99",
        "after p99",
        "token p50, ms",
        "p99",
        "moved, GB/s",
        "kept, GB",
    ]
    rows = [
        [
            way["name"],
            f"{way['nodes']:,}",
            f"{way['rows']:.1f}",
            f"{way['first_p50']:.2f}",
            f"{way['first_p99']:.2f}",
            f"{way['first_after_p99']:.2f}",
            f"{1e3 * way['token_p50']:.1f}",
            f"{1e3 * way['token_p99']:.1f}",
            f"{way['moved_per_second'] / 1e9:.1f}",
            f"{way['kept_mean'] * way['nodes'] / 1e9:,.0f}",
            f"{way['fed_again_per_turn']:.0f}",
            f"{way['turns_lost']:,}",
        ]
        for way in simulated["ways"]
    ]
    ways = table([*names, "fed again", "turns that broke"], rows)
    return head + table(heads, lines) + "\n" + about + ways + "\n" + NOTES


def first_tokens() -> str:
    """The picture of waiting, while nodes die and come back."""
    simulated = json.loads((REPORTS / "capacity.json").read_text(encoding="utf-8"))["simulated"]
    lines = {
        way["name"]: [(2.0 * at, value) for at, value in enumerate(way["series"]) if value]
        for way in simulated["ways"]
    }
    return line_plot(lines, "seconds", "time to the first token, 95th percentile, s")


def memories() -> str:
    """The picture of memory over what was said before."""
    found = json.loads((REPORTS / "capacity.json").read_text(encoding="utf-8"))
    measured, many = found["measured"], found["simulated"]["conversations"]
    past = [1 << power for power in range(6, 18)]
    state = [(math.log2(tokens), many * measured["snapshot_bytes"] / 1e12) for tokens in past]
    cache = [(math.log2(tokens), many * tokens * measured["cache_bytes_per_token"] / 1e12) for tokens in past]
    axes = "tokens of a conversation", f"memory of {many:,} conversations, TB"
    return line_plot({"state": state, "cache": cache}, *axes, name_x=lambda power: f"{2**power:,.0f}")
