"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    seed: of the random numbers; None draws one from the system.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("repetition_penalty", 1e-3, 1e3),
            ("temperature", 0, 1e3),
            ("top_k", 0, math.inf),
            ("top_p", 1e-9, 1),
            ("min_p", 0, 1),
            ("seed", 0, 2**64 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} is {value}, expected {low:g} to {high:g}; change the option")


class Sampler:
    """Draws tokens of one sequence; keeps its random numbers and the tokens it has seen."""

    def __init__(self, options: Sampling, vocab_size: int) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._seen = np.zeros(vocab_size, bool)

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is always the most likely one."""
        return self._options.temperature == 0 and self._options.repetition_penalty == 1

    def see(self, ids: np.ndarray | list[int]) -> None:
        """Count tokens as seen, for the repetition penalty."""
        self._seen[ids] = True

    def __call__(self, logits: np.ndarray) -> int:
        """The next token from logits [vocab] float32; it counts as seen."""
        penalty = self._options.repetition_penalty
        if penalty != 1:
            scaled = np.where(logits > 0, logits / penalty, logits * penalty)
            logits = np.where(self._seen, scaled, logits)
        if self._options.temperature == 0:
            token = int(np.argmax(logits))
        else:
            tokens, weights = candidates(logits, self._options)
            edges = np.cumsum(weights)
            at = np.searchsorted(edges, self._random.random() * edges[-1], side="right")
            token = int(tokens[min(at, len(tokens) - 1)])  # past the end where a logit is NaN
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
