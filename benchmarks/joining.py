"""Time between tokens of running streams while a long prompt joins, by the pieces in which it is fed.

python benchmarks/joining.py BUNDLE -o report.json
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
from dijiang.runtime.generate import prepare
from dijiang.runtime.options import MOST_TOKENS, Generation
from dijiang.runtime.sequence import Record

#: Tokens of the prompt; steps before it comes; tokens of pieces that are timed alone.
PROMPT, BEFORE, PIECES = 4096, 300, (1, 2, 4, 8, 16, 32, 64)
#: Streams that run, and tokens of a piece at most; None: as many as take as long as a step, 16 at least.
CASES = ((1, None), (1, 16), (1, 8), (1, 4), (1, 2), (4, None), (8, None))


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


def joined(model: dijiang.Model, running: int, budget: int | None) -> dict[str, Any]:
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
    ratio = {f"p{p}_ratio": round(told[f"while_p{p}"] / told[f"before_p{p}"], 2) for p in (50, 99)}
    return {"running": running, "piece": budget} | told | ratio | {"first_token_s": round(waited, 2)}


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
    report = {
        "model": given.bundle.resolve().name,
        "pieces_ms": {tokens: alone(model, tokens) for tokens in PIECES},
        "cases": [joined(model, *case) for case in CASES],
    }
    tell(report, given.output)


if __name__ == "__main__":
    main()
