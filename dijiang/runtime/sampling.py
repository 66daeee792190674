"""Choosing the next token from its logits."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ..errors import SessionError
from .grammar import Matcher
from .options import Generation
from .sessions.base import Output
from .snapshot import COUNT

#: Candidates looked at before a nucleus needs a sort of the whole vocabulary.
SHORTLIST = 1024
NO_BIAS: Mapping[int, float] = MappingProxyType({})
#: Columns for each value that `largest` looks for, and at least.
COLUMNS, FEWEST_COLUMNS = 8, 512


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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def require_numbers(logits: np.ndarray, positions: int | np.ndarray, real: bool | np.ndarray = True) -> None:
    """SessionError if logits [..., vocab] hold NaN, or infinity as their largest.

    positions: [...], for the message.  real: [...], False where they do not matter.
    """
    broken = ~np.isfinite(logits.max(-1)) & real
    if broken.any():
        position = np.broadcast_to(positions, broken.shape)[broken][0]
        raise SessionError(
            f"the logits at position {position} hold NaN or infinity: a number left the range of the bundle's "
            "types, or the state is damaged; start from new_state(), check the bundle with dijiang verify, or "
            "export it in bf16 or fp32"
        )


def most_likely(output: Output, row: int, column: int, position: int) -> int:
    """The token that a step chose for a position; SessionError: see `require_numbers`.

    Logits may lie on a device. So they are looked at only where the token is the first of the vocabulary: that is
    what ArgMax says of NaN.
    """
    token = int(output.tokens[row, column])
    if token == 0:
        require_numbers(output.logits[row, column], position)
    return token


class Sampler:
    """Draws tokens of one sequence.

    seen: which token ids stand in the sequence so far, [vocab] bool; the sampler's own from now on.
    bias: added to the logits before all else, by token id.
    matcher: where a grammar says what may come.
    counts: how often each token stands in the answer so far, see `Seam`.
    """

    def __init__(
        self,
        options: Generation,
        seen: np.ndarray,
        bias: Mapping[int, float] = NO_BIAS,
        matcher: Matcher | None = None,
        counts: bytes = b"",
    ) -> None:
        self._options, self._seen, self._matcher = options, seen, matcher
        self._counts = np.zeros(len(seen) if options.counts else 0, COUNT)
        if options.counts and counts:
            self._counts[:] = np.frombuffer(counts, COUNT)
        self._taken = self._taken_of(self._counts)
        self._biased = np.array([*bias], np.int64), np.array([*bias.values()], np.float32)
        self._draw = Draws(options.seed)

    def __call__(self, logits: np.ndarray, position: int) -> int:
        """The token of a position from logits [vocab] float32; it counts as seen.

        Raises:
            SessionError: see `require_numbers`.
        """
        require_numbers(logits, position)
        tokens, amounts = self._biased
        if len(tokens):
            logits = logits.copy()
            logits[tokens] += amounts
        if self._matcher is not None:
            logits = np.where(self._matcher.allowed(), logits, np.float32(-np.inf))
        penalty = self._options.repetition_penalty
        if penalty != 1:
            scaled = np.where(logits > 0, logits / penalty, logits * penalty)
            logits = np.where(self._seen, scaled, logits)
        if self._options.counts:
            logits = np.subtract(logits, self._taken, dtype=np.float64).astype(np.float32)
        if self._options.temperature == 0:
            token = int(np.argmax(logits))
        else:
            tokens, weights = candidates(logits, self._options)
            edges = np.cumsum(weights)
            at = np.searchsorted(edges, self._draw(position) * edges[-1], side="right")
            token = int(tokens[min(at, len(tokens) - 1)])
        self._seen[token] = True
        if self._options.counts:
            self._counts[token] += 1
            self._taken[token] = self._taken_of(self._counts[token])
        if self._matcher is not None:
            self._matcher.take(token)
        return token

    @property
    def counts(self) -> bytes:
        """How often each token stands in the answer, where the options ask for it: COUNT [vocab]."""
        return self._counts.tobytes()

    def _taken_of(self, counts: np.ndarray) -> np.ndarray:
        """What presence and frequency take from the logits of tokens that stand there so often, float64."""
        options = self._options
        return np.where(counts > 0, options.presence_penalty + options.frequency_penalty * counts, 0.0)


def candidates(logits: np.ndarray, options: Generation) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] that may be drawn, most likely first where a filter is on, and weights [n] float64.

    Only a shortlist of the vocabulary is sorted, unless the nucleus is larger than that.
    """
    peak = logits.max()

    def weigh(some: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # of a tiny temperature: the peak alone is left
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
    `count` values reach, and few others do. So little is left to partition (ADR 0011).
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
