"""What a verification found, and whether it is good enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import ParityError
from ..models.decay import Decay
from ..typed import strict
from .difference import Difference, relative
from .gates import Verdict

#: Layers whose states tell a wrong weight before depth amplifies rounding: the second one sees all of
#: the first.
EARLY = 2
#: Rounding of one number of float32.
FLOAT32_EPSILON = float(np.finfo(np.float32).eps) / 2


@dataclass(frozen=True)
class StateError:
    """RMS-relative error of the worst layer's state after `length` tokens."""

    length: int
    rms_relative_error: float
    layer: int


@dataclass(frozen=True)
class Detail:
    """What a picture of a verification shows, and the stored report leaves out.

    ids, positions, errors, kl: of each token compared: its id, where it stood, the RMS error of the logits
    after it, and their KL in nats.  states: length -> error of each layer's state.
    decays: of the checkpoint, a layer each.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    errors: tuple[float, ...]
    kl: tuple[float, ...]
    states: dict[int, list[float]]
    decays: tuple[Decay, ...]


@dataclass(frozen=True)
class Parity:
    """The report of the verification of one graph, and of the bundle's others.

    graph: its name.  others: the reports of the graphs after it, on the same tokens.
    tokens, positions: tokens compared, and the positions 0 .. positions - 1 they stood at.
    learned: whether they are text to this model: from a file, or drawn by one that is no longer random.
    judged: whether its text counts; not that of integer weights of a model that was converted and not yet
    fine-tuned: it makes no sense, and rounding changes it at will.
    rounded: the reference, rounded as the bundle is (`parity.rounded`), against itself in float64; in fp32 what
    float32 loses.  rounded_state: the same of `early_state_error`.  median_kl, rounded_kl: of the middle token; the
    mean is often that of a few tokens.
    step_error, step_rms: largest and RMS difference between the logits of one-token-at-a-time decoding
    and of the prefill, over the first `steps` tokens.  padded_error, padded_rms: the same of two beginnings of the
    first window as a padded batch, and of the token after each; None: an engine for one sequence.
    column_error, rounded_column: RMS error of the vocabulary's token whose logits are furthest off, and the twin's.
    far_position, far_error, rounded_far: RMS-relative error of the logits from that position on, and the twin's;
    None: positions end before.
    state_errors: on the way through the first window.
    layer_errors: each layer's at its end; what a layer adds to the residual shows in the next one's.
    calibrated_on: tokens of the text that the bundle's integers were rounded by: it is nearer there than elsewhere.
    decay_change: the reference without its trained D1/D2 against the one with them, for
    `--decay analytic` exports of trained tables.
    """

    tokens: int
    positions: int
    text: str
    learned: bool
    judged: bool
    logits: Difference
    rounded: Difference
    rounded_state: float
    median_kl: float
    rounded_kl: float
    step_error: float
    step_rms: float
    steps: int
    padded_error: float | None
    padded_rms: float | None
    column_error: float
    rounded_column: float
    far_position: int | None
    far_error: float | None
    rounded_far: float | None
    state_errors: tuple[StateError, ...]
    layer_errors: tuple[float, ...]
    decay_change: Difference | None
    same_source: bool
    reference_dtype: str
    dijiang: str
    graph: str
    calibrated_on: int = 0
    detail: Detail | None = field(default=None, compare=False, repr=False)
    gates: tuple[Verdict, ...] = ()
    others: tuple[Parity, ...] = ()

    @property
    def metrics(self) -> dict[str, float | None]:
        """What gates are about; larger is worse. None: not measured."""
        d, judged, early = self.logits, self.judged, float(np.max(self.layer_errors[:EARLY]))
        middle = self.median_kl / max(self.rounded_kl, FLOAT32_EPSILON**2)  # KL is quadratic
        plain = self.rounded.rms_relative_error
        step, padded, column, rounded_column = (
            None if error is None else relative(error, d.reference_rms)
            for error in (self.step_rms, self.padded_rms, self.column_error, self.rounded_column)
        )
        over = {
            "error": _over(d.rms_relative_error, plain),
            "step": _over(step, plain),
            "padded": _over(padded, plain),
            "far": _over(self.far_error, self.rounded_far),
            "column": _over(column, rounded_column),
        }
        units = {f"{what}_over_{unit}": times for unit in ("float32", "rounding") for what, times in over.items()}
        return units | {
            "max_error": d.max_error,
            "step_error": self.step_error,
            "state_over_rounding": _over(early, self.rounded_state),
            "state_beyond_rounding": early - self.rounded_state,
            "error_beyond_rounding": d.rms_relative_error - plain,
            "kl_over_rounding": middle if self.learned and judged else None,
            "rms_relative_error": d.rms_relative_error,
            "kl": d.kl,
            "kl_on_text": d.kl if self.learned and judged else None,
            "early_state_error": early,
            "top1_disagreement": 1 - d.top1_agreement if judged and d.perplexity is not None else None,
            "perplexity_change": d.perplexity_change if judged else None,
        }

    @property
    def worst_layer(self) -> int:
        """The layer whose state is furthest off, relative to its size."""
        return int(np.argmax(self.layer_errors))

    @property
    def each(self) -> tuple[Parity, ...]:
        """The reports of all graphs."""
        return (self, *self.others)

    @property
    def failures(self) -> tuple[str, ...]:
        """Gates that were not met, by any graph."""
        several = bool(self.others)
        return tuple(
            f"{f'{report.graph} ' if several else ''}{v.metric} {v.found:.2e}, allowed {v.bound:.1e}"
            for report in self.each
            for v in report.gates
            if not v.passed
        )

    @property
    def passed(self) -> bool | None:
        """Whether every gate was met, by every graph; None: its text is not judged."""
        return False if self.failures else True if self.judged else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as stored in the bundle; what is no number is null."""
        others = [other.to_dict() for other in self.others]
        stored = asdict(replace(self, detail=None, others=()))
        del stored["detail"]
        return strict(stored) | {"worst_layer": self.worst_layer, "passed": self.passed, "others": others}

    def require(self, advice: str = "do not ship it: report the checkpoint and these figures") -> None:
        """Raise ParityError unless every gate was met."""
        if self.failures:
            worst = f"layer {self.worst_layer} is the worst ({self.layer_errors[self.worst_layer]:.1e} off)"
            found = [v.found for report in self.each for v in report.gates]
            beyond = (
                ""
                if np.isfinite(found).all()
                else "a number is too large for its type, of which float16 ends at 65504; "
            )
            raise ParityError(
                f"the bundle differs from its checkpoint: {'; '.join(self.failures)}; {worst}; {beyond}{advice}"
            )


def _over(error: float | None, rounding: float | None) -> float | None:
    """An error in units of what rounding costs, at least of the rounding of one number in float32; None stays."""
    return None if error is None or rounding is None else error / max(rounding, FLOAT32_EPSILON)
