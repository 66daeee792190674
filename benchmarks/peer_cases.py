"""What is measured: the sides, the groups of sides that take turns, and the numbers to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dijiang.models.presets import PRESETS

#: A sample counts if runnable threads waited for a CPU that another had during at most this share of it.
QUIET = 0.05


@dataclass(frozen=True)
class Pair:
    """Two ways of one side, in turn in one process: their ratio is finer than that of two processes.

    method: of the side, returns the seconds of the first, the second, the first ...; labels: of both.
    """

    method: str
    labels: tuple[str, str]


PAIRS = {
    "loop": Pair("loop_and_bare", ("Model.generate", "bare run_with_iobinding")),
    "depth": Pair("far_and_near", ("at the last depth", "at depth 0")),
}


class Side(Protocol):
    """One implementation of one model."""

    def prefill(self, tokens: int, repeat: int) -> list[float]:
        """Seconds for a prompt of `tokens`, `repeat` times."""
        ...

    def decode(self, depth: int, tokens: int, repeat: int) -> list[float]:
        """Seconds for `tokens` decode steps after `depth` tokens, `repeat` times."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a side finds its files and how many threads it gets."""

    cache: Path
    preset: str
    threads: int

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the shape."""
        return PRESETS[self.preset]


def _dijiang(kind: str) -> Callable[[Place], Side]:
    def make(place: Place) -> Side:
        from peer_ours import Ours

        return Ours(place.cache / f"{place.preset}-{kind}", place.threads)

    return make


def _llama(kind: str, *options: str) -> Callable[[Place], Side]:
    def make(place: Place) -> Side:
        from peer_llama import LlamaBench, model

        file = model(place.cache, place.preset, place.config, kind)
        return LlamaBench(place.cache, file, place.threads, options)

    return make


def _transformers(precision: str) -> Callable[[Place], Side]:
    def make(place: Place) -> Side:
        from peer_torch import Transformers

        return Transformers(place.config, place.threads, precision)

    return make


def _published(place: Place) -> Side:
    from peer_ours import checkpoint
    from peer_torch import Published

    return Published(checkpoint(place.cache, place.preset), place.threads)


#: Name -> maker. Ours are of the native dialect; -ort: without our operator. llama.cpp's
#: default leaves flash attention to itself; -fa0 and -fa1 force it.
SIDES: dict[str, Callable[[Place], Side]] = {
    **{f"dijiang-{kind}": _dijiang(kind) for kind in ("fp32", "int8", "int4", "int8-ort", "int4-ort")},
    **{f"llama.cpp-{kind}": _llama(kind) for kind in ("q8_0", "q4_0")},
    **{f"llama.cpp-{kind}-fa0": _llama(kind, "-fa", "0") for kind in ("q8_0", "q4_0")},
    **{f"llama.cpp-{kind}-fa1": _llama(kind, "-fa", "1") for kind in ("q8_0", "q4_0")},
    **{f"transformers-{precision}": _transformers(precision) for precision in ("fp32", "bf16")},
    "published": _published,
}


def bundle_kind(side: str) -> str | None:
    """PRECISION or PRECISION-DIALECT of a side of ours."""
    name, _, kind = side.partition("-")
    return kind if name == "dijiang" else None


def gguf_type(side: str) -> str | None:
    """The type of a side's GGUF file; such a side runs in llama.cpp's own process."""
    name, _, rest = side.partition("-")
    return rest.partition("-")[0] if name == "llama.cpp" else None


@dataclass(frozen=True)
class Group:
    """Sides that take turns, `rounds` times, on every test; the first is compared with the others.

    Samples of one turn: `repeat`. A decode sample is `tokens` steps. `pair`: a row of PAIRS that is
    measured instead.
    """

    preset: str
    sides: tuple[str, ...]
    depths: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    tokens: int = 32
    rounds: int = 5
    repeat: int = 1
    pair: str | None = None


P410, P70 = "pythia-410m", "pythia-70m"
FLOATS = ("dijiang-fp32", "transformers-fp32", "transformers-bf16")
GROUPS = {
    "int8": Group(P410, ("dijiang-int8", "llama.cpp-q8_0"), (0, 2048), (128, 512), repeat=3),
    "int8-8k": Group(P410, ("dijiang-int8", "llama.cpp-q8_0"), (8192,), (), 16, rounds=1, repeat=4),
    "int4": Group(P410, ("dijiang-int4", "llama.cpp-q4_0"), (0, 2048), (128, 512), repeat=3),
    "int4-8k": Group(P410, ("dijiang-int4", "llama.cpp-q4_0"), (8192,), (), 16, rounds=1, repeat=4),
    "fp32": Group(P410, FLOATS, (0, 2048, 8192), (128, 512), 16, 3, 2),
    # The published tables end at 2,048 positions.
    "published": Group(P410, ("dijiang-fp32", "published"), (0, 512, 2032), (128, 512), 1, 3),
    "70m-int8": Group(P70, ("dijiang-int8", "llama.cpp-q8_0"), (0, 2048), (128, 512), 128, repeat=3),
    "70m-int4": Group(P70, ("dijiang-int4", "llama.cpp-q4_0"), (0, 2048), (128, 512), 128, repeat=3),
    "70m-fp32": Group(P70, FLOATS, (0, 2048, 8192), (128, 512), 32, 3, 2),
    "70m-published": Group(P70, ("dijiang-fp32", "published"), (0, 512, 2032), (128, 512), 2, 3),
    "operator-int8": Group(P410, ("dijiang-int8", "dijiang-int8-ort"), (0,), (512,), repeat=3),
    "operator-int4": Group(P410, ("dijiang-int4", "dijiang-int4-ort"), (0,), (512,), repeat=3),
    "operator-70m": Group(P70, ("dijiang-int8", "dijiang-int8-ort"), (0,), (512,), 128, repeat=3),
    "endless": Group(P410, ("dijiang-int8",), (0, 10**6), (), 16, 8, 10, pair="depth"),
    "endless-fp32": Group(P410, ("dijiang-fp32",), (0, 10**6), (), 8, 6, 6, pair="depth"),
    "flash-q8_0": Group(P410, ("llama.cpp-q8_0-fa0", "llama.cpp-q8_0-fa1"), (0, 2048), (512,), rounds=3, repeat=3),
    "flash-q4_0": Group(P410, ("llama.cpp-q4_0-fa0", "llama.cpp-q4_0-fa1"), (0, 2048), (512,), rounds=3, repeat=3),
    **{
        f"70m-loop-{precision}": Group(P70, (f"dijiang-{precision}",), (), (), 32, 10, 20, pair="loop")
        for precision in ("fp32", "int8", "int4")
    },
}


@dataclass(frozen=True)
class Target:
    """A number to reach. `kind` names how `peer_report` computes it from a group; `test` says on what.

    must, stretch: as printed; `at_most` for costs.
    """

    label: str
    group: str
    kind: str
    must: float
    stretch: float | None
    test: str = ""
    at_most: bool = False


TARGETS = (
    Target("410M int8 decode: weights at one byte x tokens/s / read bandwidth", "int8", "share", 0.74, 0.80),
    Target("410M int8 decode / llama.cpp Q8_0, depth 0", "int8", "ratio", 1.5, 1.8, "tg @ d0"),
    Target("410M int8 decode / llama.cpp Q8_0, depth 2048", "int8", "ratio", 6, 8, "tg @ d2048"),
    Target("410M int8 decode / llama.cpp Q8_0, depth 8192", "int8-8k", "ratio", 20, 30, "tg @ d8192"),
    Target("410M int4 decode / llama.cpp Q4_0, depth 0", "int4", "ratio", 1.3, 1.6, "tg @ d0"),
    Target("410M int4 decode / llama.cpp Q4_0, depth 2048", "int4", "ratio", 6, 8, "tg @ d2048"),
    Target("410M int8 prefill 512 / llama.cpp Q8_0", "int8", "ratio", 3, 4, "pp512"),
    Target("410M int8 time per token, depth 10^6 / depth 0", "endless", "pair", 1.02, None, at_most=True),
    Target("70M int8 decode / llama.cpp Q8_0, depth 0", "70m-int8", "ratio", 1.2, 1.5, "tg @ d0"),
    Target("70M int4 bundle bytes / parameters", "70m-int4", "size", 0.75, None, at_most=True),
    Target(
        "70M int8 loop overhead over bare run_with_iobinding",
        "70m-loop-int8",
        "overhead",
        0.05,
        0.02,
        at_most=True,
    ),
)
