"""Measures of how far logits are from a reference's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..runtime.sampling import log_softmax

#: Rows of logits compared at once: bounds the float64 temporaries.
ROWS = 64
#: Sizes below this count as this one: some kernels give 1e-40 where the reference has 0.
LEAST = 1e-30


def relative(error: float, size: float) -> float:
    """An error as a share of what it is about, which may be 0; NaN stays."""
    return error / max(size, LEAST)


@dataclass(frozen=True)
class Difference:
    """Logits [N, vocab] of a candidate against those of a reference.

    max_error: largest absolute difference.  rms_relative_error: RMS of the difference over RMS of
    the reference, reference_rms.  kl: mean KL(reference || candidate), nats.  top1_agreement: share of positions
    with the same most likely token.  reference_entropy: mean, of the reference's next token, nats.
    perplexity: exp of the mean negative log-likelihood of the
    tokens that follow, None where no text was given.
    """

    max_error: float
    rms_relative_error: float
    reference_rms: float
    kl: float
    top1_agreement: float
    reference_entropy: float
    reference_perplexity: float | None
    perplexity: float | None

    @property
    def perplexity_change(self) -> float | None:
        """Perplexity over the reference's, minus 1."""
        if self.perplexity is None or self.reference_perplexity is None:
            return None
        return self.perplexity / self.reference_perplexity - 1


class Sums:
    """Running sums of a Difference, window by window."""

    def __init__(self) -> None:
        self.rows = self.agreed = self.followed = self.numbers = 0
        self.max_error = self.squares = self.reference_squares = self.kl = self.entropy = 0.0
        self.losses = np.zeros(2)
        #: Of every row, in order: RMS error and KL.
        self.row_errors: list[float] = []
        #: Of every token of the vocabulary: squared errors of its logit.
        self.columns: np.ndarray | float = 0.0
        self.row_kl: list[float] = []

    def add(self, reference: np.ndarray, candidate: np.ndarray, ids: np.ndarray) -> None:
        """Logits [T, vocab] of the tokens ids [T], or [T + 1]: row t predicts ids[t + 1]."""
        for start in range(0, len(reference), ROWS):
            rows = slice(start, start + ROWS)
            self._add(reference[rows], candidate[rows], ids[start + 1 : start + ROWS + 1])

    def _add(self, reference: np.ndarray, candidate: np.ndarray, following: np.ndarray) -> None:
        error = candidate - reference
        squares = error**2
        self.max_error = float(np.maximum(self.max_error, np.abs(error).max()))  # keeps NaN
        self.squares += float(squares.sum())
        self.columns = self.columns + squares.sum(0)
        self.row_errors += (squares.mean(-1) ** 0.5).tolist()
        self.reference_squares += float((reference**2).sum())
        expected, found = log_softmax(reference), log_softmax(candidate)
        likelihood = np.exp(expected)
        kl = (likelihood * (expected - found)).sum(-1)
        self.kl += float(kl.sum())
        self.row_kl += kl.tolist()
        self.entropy -= float((likelihood * expected).sum())
        self.agreed += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        self.rows += len(reference)
        self.numbers += reference.size
        at = np.arange(len(following)), following
        self.losses -= expected[at].sum(), found[at].sum()
        self.followed += len(following)

    @property
    def worst_column(self) -> float:
        """RMS error of the logit that is furthest off, of those of the vocabulary."""
        return float((np.max(self.columns) / max(self.rows, 1)) ** 0.5)

    def result(self, *, is_text: bool) -> Difference:
        """The Difference of everything added."""
        with np.errstate(over="ignore"):
            perplexities = np.exp(self.losses / max(self.followed, 1)) if is_text else (None, None)
        return Difference(
            max_error=self.max_error,
            rms_relative_error=relative(self.squares**0.5, self.reference_squares**0.5),
            reference_rms=(self.reference_squares / max(self.numbers, 1)) ** 0.5,
            kl=self.kl / self.rows,
            top1_agreement=self.agreed / self.rows,
            reference_entropy=self.entropy / self.rows,
            reference_perplexity=None if perplexities[0] is None else float(perplexities[0]),
            perplexity=None if perplexities[1] is None else float(perplexities[1]),
        )
