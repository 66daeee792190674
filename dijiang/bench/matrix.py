"""Which tests to run: llama-bench's lists and ranges, their Cartesian product, and what was refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Literal

from ..runtime.options import MOST_THREADS, MOST_TOKENS

#: 512 | 128-512 (each) | 128-512+128 | 128-2048*2; a sign is read so that it can be refused.
RANGE = re.compile(r"(-?\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
#: Turns a kind of test off.
NONE = "none"
#: Values that one range may have.
LONGEST = 1000


@dataclass(frozen=True)
class Test:
    """One row of a report.

    kind: pp processes a prompt of `tokens` tokens, tg generates `tokens` tokens one by one.
    depth: tokens already in the state.  batch: sequences side by side.  threads: None: all cores.
    way: of the subject's loops, which one decodes; empty: the one that users run.
    """

    __test__ = False  # not a test of pytest

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0
    batch: int = 1
    threads: int | None = None
    way: str = ""

    @property
    def prompt(self) -> bool:
        """Whether a prompt is timed, and not decoding."""
        return self.kind == "pp"

    @property
    def name(self) -> str:
        """As llama-bench writes it, and the way."""
        depth, way = f" @ d{self.depth}" if self.depth else "", f" {self.way}" if self.way else ""
        return f"{self.kind}{self.tokens}{depth}{way}"

    @property
    def label(self) -> str:
        """The name with what else tells two rows apart."""
        return f"{self.name}, batch {self.batch}" + (f", {self.threads} threads" if self.threads else "")

    @property
    def end(self) -> int:
        """Positions that a sequence needs."""
        return self.depth + self.tokens

    @classmethod
    def of(cls, row: dict[str, Any]) -> Test:
        """The test of a row of a report."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})


def failure(message: str, model: str | None = None, test: str | None = None) -> dict[str, Any]:
    """One of a report's `errors`: a test, or a whole model, that could not be measured, and why."""
    return {"model": model, "test": test, "message": message}


def plan_tests(
    prompts: str = "512",
    generations: str = "128",
    depths: str = "0",
    batches: str = "1",
    threads: str | None = None,
) -> tuple[list[Test], list[dict[str, Any]]]:
    """The Cartesian product of the options' values; a value that is no size is a failure, not the end.

    Each argument is a list like `512`, `0,2048`, `128-512+128`, `1-16*2`; `none` for prompts or
    generations leaves those tests out.
    """
    failures: list[dict[str, Any]] = []

    def values(option: str, text: str, least: int, most: int = MOST_TOKENS) -> list[int]:
        good: list[int] = []
        for part in text.split(","):
            found = _range(part.strip())
            if not found or found[0] < least or found[-1] > most:
                sizes = f"up to {LONGEST} sizes from {least} to {most} like 512, 0,2048, 128-512+128 or 1-16*2"
                failures.append(failure(f"{option} {part or 'nothing'}: expected {sizes}; change it"))
            else:
                good += found
        return list(dict.fromkeys(good))

    kinds: list[tuple[Literal["pp", "tg"], int]] = []
    if prompts != NONE:
        kinds += [("pp", tokens) for tokens in values("-p", prompts, 1)]
    if generations != NONE:
        kinds += [("tg", tokens) for tokens in values("-n", generations, 1)]
    counts: list[int | None] = [None] if threads is None else [*values("-t", threads, 1, MOST_THREADS)]
    sizes = product(kinds, values("-d", depths, 0), values("-b", batches, 1), counts)
    tests = [Test(kind, tokens, depth, batch, count) for (kind, tokens), depth, batch, count in sizes]
    if not tests and not failures:
        failures.append(failure("no tests, expected one or more; give -p or -n a size"))
    return tests, failures


def series_of(tests: Sequence[Test]) -> list[list[Test]]:
    """Tests that differ only in depth or in the way, together."""
    series: dict[Test, list[Test]] = {}
    for test in tests:
        series.setdefault(replace(test, depth=0, way=""), []).append(test)
    return list(series.values())


def _range(part: str) -> list[int]:
    """Values of a size or a range; none if it is neither, does not grow or is too long."""
    match = RANGE.fullmatch(part)
    if match is None:
        return []
    first, last, by = int(match[1]), int(match[2] or match[1]), int(match[4] or 1)
    values: list[int] = []
    while first <= last and len(values) <= LONGEST:
        values.append(first)
        first = first * by if match[3] == "*" else first + by
    return values if len(values) <= LONGEST else []
