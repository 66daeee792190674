"""Options of loading and of generating: each is declared here, once, for Python and the command line."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypeVar

from ..errors import InputError
from ..recipe import AUTO, GRAPHS, PROVIDERS

T = TypeVar("T", bound="Checked")
#: Tokens that one call may ask for.
MOST_TOKENS = 1 << 40
#: Threads that a session may have.
MOST_THREADS = 4096
#: Kind of an option -> what a message calls it.
KINDS: dict[type, str] = {Real: "a number", Integral: "a whole number", str: "text", bool: "yes or no"}


#: Options of a generation that change no token, and that only one sequence at a time has a use for.
ALONE = ("speculate",)


def option(
    default: Any,
    kind: type,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    filters: bool = False,
) -> Any:
    """A field of an options class.

    kind: of its value, or of each of several where the default is ().  low, high: its range.
    flags: on the command line; none: the field's name.  choices: values, where they are few.
    filters: it leaves tokens out of a draw, so that it does nothing where none is drawn.
    """
    facts = {"kind": kind, "help": help, "low": low, "high": high, "flags": flags, "choices": choices}
    return field(default=default, metadata=facts | {"filters": filters})


@dataclass(frozen=True)
class Checked:
    """What the options classes share: values are checked when they are made."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, facts = getattr(self, one.name), one.metadata
            if value is None and one.default is None:
                continue
            each = value if one.default == () and not isinstance(value, str) else (value,)
            kind, low, high = facts["kind"], facts["low"], facts["high"]
            for part in each if isinstance(each, (tuple, list, set, frozenset)) else (None,):
                good = isinstance(part, kind) and (kind is bool or not isinstance(part, bool))
                if good and kind in (Real, Integral):
                    good = low <= part <= high
                if good and facts["choices"]:
                    good = part in facts["choices"]
                if not good:
                    bounds = f" from {low:g} to {high:g}" if kind in (Real, Integral) else ""
                    wanted = f"one of {', '.join(facts['choices'])}" if facts["choices"] else KINDS[kind] + bounds
                    raise InputError(f"{one.name} is {value!r}, expected {wanted}; change the option")

    @classmethod
    def of(cls: type[T], given: dict[str, Any]) -> T:
        """From keyword arguments; InputError for one that is unknown."""
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"option {unknown[0]!r} is unknown, expected one of {', '.join(known)}")
        return cls(**given)


@dataclass(frozen=True)
class Loading(Checked):
    """How a bundle is loaded.

    provider: a row of `recipe.PROVIDERS`, with `:N` for the N-th GPU; `auto`: an engine of the bundle if
    there is a GPU, CUDA if the installed onnxruntime has it, a GPU by WebGPU if it decodes faster than the
    CPU, else the CPU. The one asked for is used, or it is an error.  graph: None: the best of the bundle that
    runs here.  threads: None: as many as usable cores (`machine.limits`).  cuda_graph: None: where they are
    proven equal.  require_signature: file of public keys; one of them must have signed the bundle. None: the
    file that DIJIANG_REQUIRE_SIGNATURE names, if that is set.
    """

    provider: str = option(AUTO, str, f"{', '.join(PROVIDERS)}, with :N for the N-th GPU; {AUTO}: the best.")
    graph: str | None = option(
        None,
        str,
        "Of the bundle. Default: the best that runs here.",
        flags=("--graph", "--dialect"),
        choices=tuple(GRAPHS),
    )
    threads: int | None = option(
        None, Integral, "Default: all cores it may use.", low=1, high=MOST_THREADS, flags=("-t", "--threads")
    )
    cuda_graph: bool | None = option(
        None, bool, "Replay captured decode steps on a GPU; default: where they are proven equal."
    )
    require_signature: str | None = option(
        None, str, "File of public keys; one of them must have signed the bundle."
    )


@dataclass(frozen=True)
class Generation(Checked):
    """How text is generated; the filters apply in the order of the fields.

    max_tokens: to generate at most.
    repetition_penalty: logits of tokens seen before are divided by it if positive, else multiplied
        (CTRL, arXiv 1909.05858); 1 is off.
    presence_penalty: taken from the logit of each token of the answer so far, as OpenAI's API does; 0 is off.
    frequency_penalty: as that, times how often the token stands in the answer.
    temperature: 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the fewest most likely tokens whose probabilities reach p; 1 keeps all.
    min_p: drop tokens less likely than min_p times the most likely one; 0 keeps all.
    seed: of the random numbers, which are a function of it and the position; None draws one from the
        system.
    stop: strings that end the text; not part of it.
    stop_tokens: ids that end it, beside the model's own end tokens.
    ignore_eos: do not end at the model's own end tokens.
    speculate: check drafts from the text so far, several tokens a call; the same text, see `drafts`. What feeds
        many sequences at once leaves it out.
    """

    max_tokens: int = option(
        128, Integral, "Tokens at most.", low=1, high=MOST_TOKENS, flags=("-n", "--max-tokens")
    )
    repetition_penalty: float = option(1.0, Real, "1: off.", low=1e-3, high=1e3)
    presence_penalty: float = option(0.0, Real, "0: off.", low=-2, high=2)
    frequency_penalty: float = option(0.0, Real, "0: off.", low=-2, high=2)
    temperature: float = option(0.0, Real, "0: the most likely token.", low=0, high=1e3)
    top_k: int = option(0, Integral, "0: off.", low=0, filters=True)
    top_p: float = option(1.0, Real, "1: off.", low=1e-9, high=1, filters=True)
    min_p: float = option(0.0, Real, "0: off.", low=0, high=1, filters=True)
    seed: int | None = option(None, Integral, "Default: a new one each time.", low=0, high=2**64 - 1)
    stop: tuple[str, ...] | list[str] | str = option(
        (), str, "Text that ends the output; may be given several times."
    )
    stop_tokens: tuple[int, ...] | list[int] = option(
        (), Integral, "Token id that ends it; may be given several times.", low=0, flags=("--stop-token",)
    )
    ignore_eos: bool = option(False, bool, "Go on after the model's own end token.")
    speculate: bool = option(False, bool, "Several tokens a call where the text repeats itself; the same text.")

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is always the most likely one."""
        return self.temperature == 0 and self.repetition_penalty == 1 and not self.counts

    @property
    def counts(self) -> bool:
        """Whether it matters how often a token stands in the answer."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def seeded(self) -> Generation:
        """With a seed: one is drawn where there is none, so that who goes on draws the same numbers."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))

    def attempt(self, number: int) -> Generation:
        """As this, but drawn by other numbers, which no near seed has; 0: by the same."""
        if self.seed is None or not number:
            return self
        digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:8], "little"))

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; a single one need not be in a list."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


#: Options of a generation that leave tokens out of a draw.
FILTERS = tuple(one.name for one in fields(Generation) if one.metadata["filters"])


def authors_choice(sampling: Mapping[str, Any], given: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Options of `Generation` that a checkpoint's authors recommend, but for those that a user gave.

    sampling: of generation_config.json, see `bundle.opened.Bundle.sampling`.

    Raises:
        InputError: one of them is out of range.
    """
    found = {name: value for name, value in sampling.items() if value is not None and name != "do_sample"}
    draws = sampling.get("do_sample")
    if draws:
        found = {"temperature": 1.0} | found
    else:  # the others mean nothing where nothing is drawn
        found = {name: value for name, value in found.items() if name == "repetition_penalty"}
        found |= {} if draws is None else {"temperature": 0.0}
    found = {name: value for name, value in found.items() if name not in given}
    try:
        Generation.of(found)
    except InputError as error:
        raise InputError(f"generation_config.json: {error}, and export again") from None
    return found | dict(given)
