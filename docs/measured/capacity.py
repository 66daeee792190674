"""The page about how many nodes are needed, and its pictures."""

from __future__ import annotations

import json
import math

from markdown_parts import table
from pictures import line_plot

from . import REPORTS

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
