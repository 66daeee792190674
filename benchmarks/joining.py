"""Time between tokens of running streams while a long prompt joins, by the pieces in which it is fed.

python benchmarks/joining.py BUNDLE -o report.json

All cases in turns, several rounds. A figure is the median of its rounds; with ratios stand the least and the most.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from reports import tell

import dijiang
from dijiang.batching.batcher import Batcher
from dijiang.batching.turn import Turn
from dijiang.errors import DijiangError
from dijiang.machine.describe import describe_cpu
from dijiang.runtime.generate import prepare
from dijiang.runtime.operators import isa
from dijiang.runtime.options import MOST_TOKENS, Generation
from dijiang.runtime.sequence import Record

#: Tokens of the prompt; steps before it comes; tokens of pieces that are timed alone.
PROMPT, BEFORE, PIECES = 4096, 300, (1, 2, 4, 8, 16, 32, 64)
#: Streams that run, and tokens of a piece at most; None: as many as the batcher takes.
CASES = ((1, None), (4, None), (8, None), (1, 16), (1, 8), (1, 4), (1, 2))
ROUNDS = 5


class Clock:
    """When each token came; see `batching.turn.Listener`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ended = False

    def record(self, record: Record, logits: np.ndarray | None) -> None:
        """See Listener."""
        self.times.append(time.perf_counter())
        self.ended = record.finish_reason is not None

    def failed(self, error: DijiangError) -> None:
        """See Listener."""
        raise error


def begun(model: dijiang.Model, batcher: Batcher, prompt: list[int], tokens: int) -> Clock:
    """A turn on its way."""
    state, clock = model.new_state(), Clock()
    options = Generation(max_tokens=tokens, ignore_eos=True)
    batcher.submit(Turn(prepare(model, prompt, options, state, keeps=False), state, clock))
    return clock


def joined(model: dijiang.Model, running: int, budget: int | None) -> dict[str, float]:
    """Milliseconds between tokens of the first stream, before a prompt joins and while it is fed."""
    batcher = Batcher(model, 16, budget)
    stream, *_ = (begun(model, batcher, [1, 2, 3 + number], MOST_TOKENS) for number in range(running))
    for _ in range(BEFORE):
        batcher.step()
    count, started = len(stream.times), time.perf_counter()
    clock = begun(model, batcher, np.random.default_rng(0).integers(0, 1000, PROMPT).tolist(), 1)
    while not clock.ended:
        batcher.step()
    waited = time.perf_counter() - started
    gaps = {"before": np.diff(stream.times[20:count]), "while": np.diff(stream.times[count - 1 :])}
    told = {
        f"{when}_p{p}": round(1e3 * float(np.percentile(found, p)), 2)
        for when, found in gaps.items()
        for p in (50, 99)
    }
    ratio = {f"p{p}_ratio": told[f"while_p{p}"] / told[f"before_p{p}"] for p in (50, 99)}
    return told | ratio | {"first_token_s": waited}


def of_rounds(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and of ratios the spread."""
    found: dict[str, Any] = {}
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        found[name] = round(float(np.median(values)), 2)
        if name.endswith("ratio"):
            found[f"{name}_least"], found[f"{name}_most"] = round(min(values), 2), round(max(values), 2)
    return found


def alone(model: dijiang.Model, tokens: int) -> float:
    """Milliseconds of a piece."""
    state, seconds = model.new_state(), []
    for _ in range(30):
        started = time.perf_counter()
        model.forward(np.ones((1, tokens), np.int64), state)
        seconds.append(time.perf_counter() - started)
    return round(1e3 * float(np.median(seconds)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    model = dijiang.load(given.bundle)
    rounds = [[joined(model, *case) for case in CASES] for _ in range(ROUNDS)]
    report = {
        "model": given.bundle.resolve().name,
        "graph": model.graph,
        "ragged": model.session.ragged,
        "cpu": describe_cpu(Path("/"))["model"],
        "isa": isa(),
        "pieces_ms": {tokens: alone(model, tokens) for tokens in PIECES},
        "cases": [
            {"running": running, "piece": piece} | of_rounds(list(found))
            for (running, piece), found in zip(CASES, zip(*rounds, strict=True), strict=True)
        ],
    }
    tell(report, given.output)


if __name__ == "__main__":
    main()
