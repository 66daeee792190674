"""`python -m tests.fuzz`: see the package."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.reports import tell
from dijiang.version import __version__
from tests.fuzz.grammar import draw_case
from tests.fuzz.workers import CLASSES, run_cases
from tests.random_tokenizers import KINDS, sequence, streamed
from tests.random_tokenizers import tokenizer as tokenizer_of


def stream_texts(seed: int, cases: int) -> dict[str, Any]:
    """Random tokens of every kind of tokenizer: those whose streamed text is not their decoded text."""
    wrong = {}
    for kind in KINDS:
        draw = random.Random(f"{seed} {kind}")
        drawn = (sequence(kind, draw) for _ in range(cases))
        wrong[kind] = [ids for ids in drawn if streamed(kind, ids) != tokenizer_of(kind).decode(ids)]
    return {"sequences_of_each_kind": cases, "streamed_otherwise": wrong}


def main() -> None:
    """Run as many cases as asked for, and say what was found; exit 1 if anything was."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", nargs="?", choices=list(CLASSES), help="default: checkpoints")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.cases)
    draw = draw_case
    if options.kind is not None:
        CLASSES[options.kind].warm()
        draw = CLASSES[options.kind].draw_case
    report = run_cases(
        ((number, draw(options.seed, number)) for number in numbers),
        lambda text: print(text, file=sys.stderr, flush=True),
        options.workers,
    )
    facts = {
        "dijiang": __version__,
        "class": options.kind or "checkpoints",
        "seed": options.seed,
        "first": options.first,
        "cases": options.cases,
    }
    texts = stream_texts(options.seed, options.cases) if options.kind is None else {}
    tell(facts | report | texts, options.output)
    sys.exit(bool(report["findings"]))


if __name__ == "__main__":
    main()
