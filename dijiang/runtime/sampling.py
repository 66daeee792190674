"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..errors import InputError

#: Candidates looked at before a nucleus needs a sort of the whole vocabulary.
SHORTLIST = 1024
#: Columns for each value that `largest` looks for, and at least.
COLUMNS, FEWEST_COLUMNS = 8, 512


@dataclass(frozen=True)
class Sampling:
    """Options of one generation; the filters apply in the order of the fields.

    repetition_penalty: logits of tokens seen before are divided by it if positive, else multiplied
        (CTRL, arXiv 1909.05858); 1 is off.
    temperature: 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the fewest most likely tokens whose probabilities reach p; 1 keeps all.
    min_p: drop tokens less likely than min_p times the most likely one; 0 keeps all.
    seed: of the random numbers, which are a function of it and the position; None draws one from the
        system.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, low, high in RANGES:
            value: Any = getattr(self, name)
            if value is None and name == "seed":
                continue
            good = isinstance(value, kind) and not isinstance(value, bool)
            if not good or not low <= float(value) <= high:
                raise InputError(
                    f"{name} is {value!r}, expected {KINDS[kind]} from {low:g} to {high:g}; change the option"
                )


#: Option -> its kind, the smallest and the largest value.
RANGES: tuple[tuple[str, type, float, float], ...] = (
    ("repetition_penalty", Real, 1e-3, 1e3),
    ("temperature", Real, 0, 1e3),
    ("top_k", Integral, 0, math.inf),
    ("top_p", Real, 1e-9, 1),
    ("min_p", Real, 0, 1),
    ("seed", Integral, 0, 2**64 - 1),
)
KINDS: dict[type, str] = {Real: "a number", Integral: "a whole number"}


class Draws:
    """Uniform numbers in [0, 1): a function of the seed and the position, by a counter-based generator."""

    def __init__(self, seed: int | None) -> None:
        self._philox = np.random.Philox(key=seed) if seed is not None else np.random.Philox()
        self._state = self._philox.state

    def __call__(self, position: int) -> float:
        """The number of a position."""
        self._state["state"]["counter"][:] = (position, 0, 0, 0)
        self._state["buffer_pos"] = len(self._state["buffer"])
        self._philox.state = self._state
        return float(int(self._philox.random_raw()) >> 11) * 2.0**-53


class Sampler:
    """Draws tokens of one sequence.

    seen: which token ids stand in the sequence so far, [vocab] bool; the sampler's own from now on.
    """

    def __init__(self, options: Sampling, seen: np.ndarray) -> None:
        self._options, self._seen = options, seen
        self._draw = Draws(options.seed)

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is always the most likely one."""
        return self._options.temperature == 0 and self._options.repetition_penalty == 1

    def __call__(self, logits: np.ndarray, position: int) -> int:
        """The token of a position from logits [vocab] float32; it counts as seen.

        Raises:
            InputError: the logits hold NaN.
        """
        peak = logits.max()
        if np.isnan(peak):
            raise InputError(
                f"the logits at position {position} hold NaN: the model or its state is damaged; start "
                "from new_state(), and check the bundle with dijiang verify"
            )
        penalty = self._options.repetition_penalty
        if penalty != 1:
            scaled = np.where(logits > 0, logits / penalty, logits * penalty)
            logits = np.where(self._seen, scaled, logits)
        if self._options.temperature == 0:
            token = int(np.argmax(logits))
        else:
            tokens, weights = candidates(logits, self._options)
            edges = np.cumsum(weights)
            at = np.searchsorted(edges, self._draw(position) * edges[-1], side="right")
            token = int(tokens[min(at, len(tokens) - 1)])
        self._seen[token] = True
        return token


def candidates(logits: np.ndarray, options: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] that may be drawn, most likely first where a filter is on, and weights [n] float64.

    Only a shortlist of the vocabulary is sorted, unless the nucleus is larger than that.
    """
    peak = logits.max()

    def weigh(some: np.ndarray) -> np.ndarray:
        weights: np.ndarray = np.exp((some - peak).astype(np.float64) / options.temperature)
        return weights

    if options.top_k and options.top_k < len(logits):
        tokens = largest(logits, options.top_k)
        weights = weigh(logits[tokens])
        total = weights.sum()
    else:
        tokens, weights = np.arange(len(logits)), weigh(logits)
        total = weights.sum()
        if options.top_p < 1:
            tokens = _nucleus(logits, weights, options.top_p * total)
            weights = weights[tokens]
    if options.top_p < 1:
        # A token stays if the mass before it has not reached p yet.
        kept = np.cumsum(weights) - weights < options.top_p * total
        tokens, weights = tokens[kept], weights[kept]
    if options.min_p:
        kept = weights >= options.min_p * weights.max()
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values, the largest first.

    The maxima of more than `count` columns come first: the count-th largest of them is a bound that
    `count` values reach, and few others do. So little is left to partition (docs/performance.md).
    """
    columns = max(COLUMNS * count, FEWEST_COLUMNS)
    rows = len(values) // columns
    near = np.arange(len(values))
    if rows > 1:
        peaks = values[: rows * columns].reshape(rows, columns).max(axis=0)
        near = np.flatnonzero(values >= np.partition(peaks, -count)[-count])
    if count < len(near):
        near = near[np.argpartition(values[near], -count)[-count:]]
    return near[np.argsort(-values[near], kind="stable")]


def _nucleus(logits: np.ndarray, weights: np.ndarray, mass: float) -> np.ndarray:
    """The most likely tokens, at least until their weights reach `mass`."""
    if len(logits) > SHORTLIST:
        tokens = largest(logits, SHORTLIST)
        if weights[tokens].sum() >= mass:
            return tokens
    return largest(logits, len(logits))
