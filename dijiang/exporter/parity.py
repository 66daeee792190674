"""How far a bundle is from its checkpoint in float64: `dijiang verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import InputError, ParityError
from ..models.load import DecayMode, load_checkpoint
from ..models.reference import Reference
from ..runtime.bundle import store_parity
from ..runtime.model import Model, load

#: Positions a window has at most: perplexity is over non-overlapping windows.
WINDOW = 512
#: Tokens compared unless asked for more.
TOKENS = 4096
#: Lengths at which the states are compared, within the first window.
STATE_LENGTHS = (1, 8, 64, 256, 512)
#: precision -> (metric, bound it must not exceed).
GATES = {"fp32": (("max_error", 1e-4), ("step_error", 1e-4))}


@dataclass(frozen=True)
class Difference:
    """Logits [N, vocab] of a candidate against those of a reference.

    max_error: largest absolute difference.  rms_relative_error: RMS of the difference over RMS of
    the reference.  kl: mean KL(reference || candidate), nats.  top1_agreement: share of positions
    with the same most likely token.  perplexity: exp of the mean negative log-likelihood of the
    tokens that follow, None where no text was given.
    """

    max_error: float
    rms_relative_error: float
    kl: float
    top1_agreement: float
    reference_perplexity: float | None
    perplexity: float | None


@dataclass(frozen=True)
class StateError:
    """Largest RMS-relative error of any layer's state after `length` tokens."""

    length: int
    rms_relative_error: float


@dataclass(frozen=True)
class Parity:
    """The report of one verification.

    step_error: largest difference between the logits of one-token-at-a-time decoding and of the
    prefill, over the first window.  decay_change: the reference without its trained D1/D2 against
    the one with them, for `--decay analytic` exports of trained tables.  failures: gates not met.
    """

    tokens: int
    text: str
    logits: Difference
    step_error: float
    state_errors: tuple[StateError, ...]
    decay_change: Difference | None
    same_source: bool
    reference_dtype: str
    dijiang: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate was met."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as stored in the bundle."""
        return asdict(self) | {"passed": self.passed}

    def require(self) -> None:
        """Raise ParityError unless every gate was met."""
        if self.failures:
            raise ParityError(
                f"the bundle differs from its checkpoint: {'; '.join(self.failures)}; "
                "do not ship it: report the checkpoint and these figures"
            )


class _Sums:
    """Running sums of a Difference, window by window."""

    def __init__(self) -> None:
        self.rows = self.agreed = self.followed = 0
        self.max_error = self.squares = self.reference_squares = self.kl = 0.0
        self.losses = np.zeros(2)

    def add(self, reference: np.ndarray, candidate: np.ndarray, ids: np.ndarray) -> None:
        """Logits [T, vocab] of the tokens ids [T]."""
        error = candidate - reference
        self.max_error = max(self.max_error, float(np.abs(error).max()))
        self.squares += float((error**2).sum())
        self.reference_squares += float((reference**2).sum())
        expected, found = log_softmax(reference), log_softmax(candidate.astype(np.float64))
        self.kl += float((np.exp(expected) * (expected - found)).sum())
        self.agreed += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        self.rows += len(ids)
        following = np.arange(len(ids) - 1), ids[1:]
        self.losses -= expected[following].sum(), found[following].sum()
        self.followed += len(ids) - 1

    def result(self, *, is_text: bool) -> Difference:
        """The Difference of everything added."""
        perplexities = np.exp(self.losses / max(self.followed, 1)) if is_text else (None, None)
        return Difference(
            max_error=self.max_error,
            rms_relative_error=(self.squares / self.reference_squares) ** 0.5,
            kl=self.kl / self.rows,
            top1_agreement=self.agreed / self.rows,
            reference_perplexity=None if perplexities[0] is None else float(perplexities[0]),
            perplexity=None if perplexities[1] is None else float(perplexities[1]),
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def verify(
    bundle: str | Path,
    against: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    threads: int | None = None,
    store: bool = True,
) -> Parity:
    """Compare a bundle with the checkpoint it came from, in float64.

    Args:
        bundle: folder written by `export`.
        against: checkpoint folder.
        text: file to measure on; None: random token ids, and no perplexity.
        tokens: how many tokens of it at most.
        threads: of the session; None: all physical cores.
        store: put the report into the bundle.

    Returns:
        The report; `report.require()` raises if a gate of the bundle's precision was not met.
    """
    model = load(bundle, threads=threads)
    manifest = model.manifest
    mode: DecayMode = "analytic" if manifest.decay == "analytic" else "exact"
    checkpoint = load_checkpoint(against, decay=mode, repair_decay=manifest.decay == "repaired")
    reference, exact = Reference(checkpoint), None
    if mode == "analytic":
        stored = load_checkpoint(against, repair_decay=True)
        exact = Reference(stored) if stored.positions_limit else None
    window = min(manifest.positions_limit or WINDOW, checkpoint.spec.max_positions, WINDOW)
    sums, change = _Sums(), _Sums()
    step_error = 0.0
    states: list[StateError] = []
    for index, ids in enumerate(_windows(model, text, tokens, window)):
        logits = model.forward(ids[None], model.new_state(), all_logits=True)[0]
        if index == 0:
            expected, states = _compare_states(model, reference, ids)
            step_error = _step_error(model, ids, logits)
        else:
            expected = reference.forward(ids[None], 0, reference.new_state(1))[0]
        sums.add(expected, logits, ids)
        if exact is not None:
            change.add(exact.forward(ids[None], 0, exact.new_state(1))[0], expected, ids)
    is_text = text is not None
    found = sums.result(is_text=is_text)
    metrics = asdict(found) | {"step_error": step_error}
    report = Parity(
        tokens=sums.rows,
        text=str(text) if text is not None else "random token ids",
        logits=found,
        step_error=step_error,
        state_errors=tuple(states),
        decay_change=change.result(is_text=is_text) if exact is not None else None,
        same_source=checkpoint.checkpoint.sha256() == manifest.source_sha256,
        reference_dtype=str(reference.dtype),
        dijiang=__version__,
        failures=tuple(
            f"{name} {metrics[name]:.2e}, allowed {bound:.0e} at {manifest.precision}"
            for name, bound in GATES[manifest.precision]
            if not metrics[name] <= bound
        ),
    )
    if store:
        store_parity(model.bundle, report.to_dict())
    return report


def _windows(model: Model, text: str | Path | None, tokens: int, window: int) -> Iterator[np.ndarray]:
    """Token ids in windows [<= window]; a rest of one token is left out."""
    if tokens < 2:
        raise InputError(f"tokens is {tokens}, expected at least 2; compare more")
    if text is None:
        count = min(tokens, 2 * window)
        ids = np.random.default_rng(0).integers(0, model.spec.vocab_size, count)
    else:
        try:
            content = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{text}: cannot be read ({error}); give a UTF-8 text file") from error
        ids = np.array(model.tokenizer.encode(content))[:tokens]
    if len(ids) < 2:
        raise InputError(f"{text}: {len(ids)} token, expected at least 2; give a longer text")
    for start in range(0, len(ids) - 1, window):
        yield ids[start : start + window]


def _compare_states(
    model: Model, reference: Reference, ids: np.ndarray
) -> tuple[np.ndarray, list[StateError]]:
    """The reference's logits [T, vocab] of one window, and the states' errors on the way."""
    lengths = sorted({min(length, len(ids)) for length in (*STATE_LENGTHS, len(ids))})
    state, expected = model.new_state(), reference.new_state(1)
    rows, errors = [], []
    for start, stop in zip((0, *lengths), lengths, strict=False):
        rows.append(reference.forward(ids[None, start:stop], start, expected)[0])
        model.forward(ids[None, start:stop], state)
        errors.append(StateError(stop, _state_error(state.layers, expected)))
    return np.concatenate(rows), errors


def _state_error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((((f - e) ** 2).mean() / (e**2).mean()) ** 0.5) for f, e in pairs)


def _step_error(model: Model, ids: np.ndarray, prefill: np.ndarray) -> float:
    """Largest difference of one-token-at-a-time logits from the prefill's [T, vocab]."""
    state = model.new_state()
    steps = (model.forward(ids[None, t : t + 1], state)[0] for t in range(len(ids)))
    return max(float(np.abs(step - row).max()) for step, row in zip(steps, prefill, strict=True))
