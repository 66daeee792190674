"""How many nodes for how many conversations: measured, checked against two replicas, then simulated.

    python benchmarks/capacity.py measure BUNDLE -o benchmarks/results/capacity.json
    .ecosystem/ray/bin/python benchmarks/capacity.py check BUNDLE -o benchmarks/results/capacity.json
    python benchmarks/capacity.py simulate -o benchmarks/results/capacity.json

Each adds its part to the report; `make docs` makes docs/capacity.md of it. `check` needs the environment of Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import openai
from capacity_model import Cluster, Load, Node, Seen, Way

import dijiang
from dijiang.bundle.sizes import sizes
from dijiang.machine.bandwidth import measure_bandwidth
from dijiang.machine.describe import describe_cpu

ROWS, STEPS, PROMPT = (1, 2, 4, 8, 16), 40, 512
#: The check: slots of a replica, clients at once, tokens of a prompt, mean of an answer's, seconds.
SLOTS, CLIENTS, ASKED, ANSWERED, WARM, SECONDS = 8, (2, 4, 8, 16, 32), 64, 48, 3.0, 12.0
#: The simulation: nodes, conversations, seconds; part of the nodes that dies, when, until when; how busy nodes are.
NODES, CONVERSATIONS, END, DYING, DEATH, RETURN, BUSY = 1_000, 1_000_000, 300.0, 0.05, 180.0, 210.0, 0.75
#: Conversations by which a number of nodes is found, and how often it is tried.
TRIED, SETTLED = 10_000, 6
#: Base64 in a request.
SEALED = 4 / 3
KEY = "only for a measurement on loopback."


def timed(bundle: str, threads: int) -> dict[str, Any]:
    """Median seconds of a decode step by rows, and of a token of a prompt."""
    model, steps = dijiang.load(bundle, threads=threads), {}
    for rows in ROWS:
        state, seconds = model.new_state(rows), []
        for _ in range(STEPS):
            started = time.perf_counter()
            model.forward(np.ones((rows, 1), np.int64), state)
            seconds.append(time.perf_counter() - started)
        steps[rows] = float(np.median(seconds))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        model.forward(np.ones((1, PROMPT), np.int64), model.new_state())
        seconds.append(time.perf_counter() - started)
    return {"steps": steps, "prompt": float(np.median(seconds)) / PROMPT}


def measure(bundle: Path) -> dict[str, Any]:
    """One process with two threads, and two with one each, at the same time; sizes and bandwidth."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        both = list(pool.map(timed, [str(bundle)] * 2, [1, 1]))
    pair = {
        "steps": {rows: float(np.mean([one["steps"][rows] for one in both])) for rows in ROWS},
        "prompt": float(np.mean([one["prompt"] for one in both])),
    }
    model = dijiang.load(bundle)
    size = sizes(model.bundle)
    return {
        "model": bundle.resolve().name,
        "cpu": describe_cpu(Path("/"))["model"],
        "node": timed(str(bundle), 2),
        "pair": pair,
        "snapshot_bytes": len(model.new_state().snapshot().dump()),
        "state_bytes": size.state_bytes,
        "cache_bytes_per_token": size.cache_bytes_per_token,
        "bandwidth": measure_bandwidth().bytes_per_second,
    }


def node_of(found: dict[str, Any], **more: Any) -> Node:
    """A node from what was measured; a JSON file has text for numbers as keys."""
    return Node({int(rows): seconds for rows, seconds in found["steps"].items()}, found["prompt"], **more)


# Two replicas.


async def asking(url: str, model: str, clients: int, seconds: float) -> Seen:
    """Clients that ask again at once, and what they saw."""
    seen, started = Seen(), time.monotonic()

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as api:
            while (asked := time.monotonic()) < started + seconds:
                tokens = max(1, round(draw.expovariate(1 / ANSWERED)))
                stream = await api.completions.create(
                    model=model,
                    prompt=[draw.randrange(1000) for _ in range(ASKED)],
                    max_tokens=tokens,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                first = None
                async for _ in stream:
                    first = first or time.monotonic()
                assert first is not None
                if asked > started + WARM:
                    seen.first.append((asked, first - asked))
                    seen.each.append((time.monotonic() - first) / tokens)
                    seen.tokens += tokens

    await asyncio.gather(*(client(number) for number in range(clients)))
    return seen


def told(seen: Seen, seconds: float) -> dict[str, float]:
    """Rates and latencies."""
    first = [wait for _, wait in seen.first]
    return {
        "tokens_per_second": seen.tokens / seconds,
        **{f"first_p{p}": float(np.percentile(first, p)) for p in (50, 95, 99)},
        **{f"token_p{p}": float(np.percentile(seen.each, p)) for p in (50, 95, 99)},
    }


def check(bundle: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each load on two replicas in Ray Serve, and in the model.

    The first load, a client for each replica, says what the server adds to a row of a step, and to a request. The
    others are predicted.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "deploy" / "ray"))
    from loopback import on_loopback

    lines: list[dict[str, Any]] = []
    node = node_of(found["pair"], slots=SLOTS)
    with on_loopback(KEY, bundle=str(bundle), replicas=2, slots=SLOTS, queue=64) as url:
        asyncio.run(asking(url, found["model"], 4, WARM))
        for clients in CLIENTS:
            real = told(asyncio.run(asking(url, found["model"], clients, WARM + SECONDS)), SECONDS)
            if not lines:
                row = real["token_p50"] - node.steps[1]
                node = replace(
                    node,
                    steps={rows: seconds + rows * row for rows, seconds in node.steps.items()},
                    hop=max(0.0, real["first_p50"] - ASKED * node.prompt),
                )
            load = Load(ASKED, ANSWERED, think=0.0, system=0)
            cluster = Cluster(2, node, Way("check", moves=True), load, clients)
            model = told(cluster.run(60.0), 60.0)
            lines.append({"clients": clients, "hop": node.hop, "measured": real, "model": model})
    return lines


# A thousand nodes.


def ways(found: dict[str, Any]) -> list[Way]:
    """A state and a cache, kept, sent along, or made again."""
    state, each = found["snapshot_bytes"], found["cache_bytes_per_token"]
    return [
        Way("state, sent along", constant=SEALED * state, moves=True),
        Way("state, kept at the node", constant=state, keeps=True),
        Way("cache, kept at the node", each=each, keeps=True, reads=True),
        Way("cache, sent along", each=each, moves=True, reads=True),
        Way("cache, made again", each=each, reads=True),
    ]


def work(node: Node, load: Load, way: Way, feed: float) -> float:
    """Seconds of a full node that a turn costs. feed: tokens of its prompt."""
    past = load.system + load.turns * (load.question + load.answer)
    read = way.size(past) / node.bandwidth if way.reads else 0.0
    return load.answer * (node.table()[node.slots] / node.slots + read) + feed * node.prompt


def simulate(found: dict[str, Any], nodes: int, conversations: int) -> dict[str, Any]:
    """Every way with the same load, each on as many nodes as it keeps equally busy.

    The load is what keeps so many nodes busy where the state is sent along.
    """
    node, load, (first, *others) = node_of(found["node"], bandwidth=found["bandwidth"]), Load(), ways(found)
    load = replace(load, think=conversations * work(node, load, first, load.question) / (BUSY * nodes))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        lines = list(pool.map(partial(simulated, node, load, conversations), [first, *others]))
    told = {"nodes": nodes, "conversations": conversations, "dying": DYING, "death": DEATH, "back": RETURN - DEATH}
    return told | {"memory": node.memory, "link": node.link, "load": asdict(load), "ways": lines}


def sized(node: Node, load: Load, way: Way, conversations: int) -> int:
    """Nodes for so many conversations, of which a few are tried: from many nodes down, until it settles."""
    few = min(conversations, TRIED)
    feed = load.question + (0 if way.moves else load.turns * (load.question + load.answer))
    for _ in range(SETTLED):
        count = math.ceil(few / load.think * work(node, load, way, feed) / BUSY)
        seen = Cluster(count, node, way, load, few).run(END)
        feed = (feed + seen.fed / max(1, len(seen.first))) / 2
    return math.ceil(conversations / load.think * work(node, load, way, feed) / BUSY)


def simulated(node: Node, load: Load, conversations: int, way: Way) -> dict[str, Any]:
    """One way: some nodes die and come back."""
    gc.collect()
    gc.disable()  # it would look through millions of objects, again and again: most of the time
    nodes = sized(node, load, way, conversations)
    cluster = Cluster(nodes, node, way, load, conversations)
    gone, held = cluster.servers[: max(1, round(nodes * DYING))], list[float]()
    times = {
        DEATH - 1e-3: lambda: held.extend(one.kept_bytes for one in cluster.servers),
        DEATH: lambda: [one.die() for one in gone],
        RETURN: lambda: [one.rise() for one in gone],
    }
    seen = cluster.run(END, times)
    before = [wait for asked, wait in seen.first if DEATH / 2 <= asked < DEATH - 5]
    after = [wait for asked, wait in seen.first if DEATH <= asked < RETURN]
    turns = max(1, len(seen.first))
    return asdict(way) | {
        "nodes": nodes,
        "turns": turns,
        "tokens_per_second": seen.tokens / END,
        "rows": sum(one.rows for one in cluster.servers) / nodes / END,
        "fed_again_per_turn": seen.fed_again / turns,
        **{f"first_p{p}": float(np.percentile(before, p)) for p in (50, 95, 99)},
        **{f"first_after_p{p}": float(np.percentile(after, p)) for p in (50, 95, 99)},
        **{f"token_p{p}": float(np.percentile(seen.each, p)) for p in (50, 99)},
        "moved_per_second": seen.moved / END,
        "kept_mean": float(np.mean(held)),
        "kept_max": float(np.max(held)),
        "evicted_per_second": seen.evicted / END,
        "turns_lost": seen.lost,
        "series": list(by_second(seen)),
    }


def by_second(seen: Seen) -> Iterator[float | None]:
    """The 95th percentile of the time to the first token, of the turns asked for in each two seconds."""
    asked, waits = np.array(seen.first).T
    for start in range(0, int(END), 2):
        chosen = waits[(asked >= start) & (asked < start + 2)]
        yield round(float(np.percentile(chosen, 95)), 4) if len(chosen) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("measure", "check", "simulate"))
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    report = json.loads(given.output.read_text()) if given.output.exists() else {}
    if given.part == "measure":
        report["measured"] = measure(given.bundle)
    elif given.part == "check":
        report["check"] = check(given.bundle, report["measured"])
    else:
        report["simulated"] = simulate(report["measured"], given.nodes, given.conversations)
    given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
