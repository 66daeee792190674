"""From what was compared to reports: one for each graph of a bundle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..models.load import DijiangModel
from ..recipe import Recipe
from ..version import __version__
from .asked import Asked, Run
from .difference import Difference, Sums
from .findings import EARLY, Detail, Parity, StateError
from .gates import judge
from .sides import Found
from .windows import OWN, RANDOM

#: exp(entropy) of a model's own next tokens, as a share of its vocabulary, below which it has learned
#: something. Random weights: 0.4 to 1; the two trained checkpoints: 0.016 and 0.03.
LEARNED = 0.1


@dataclass(frozen=True)
class Comparison:
    """What the reports of all graphs have in common.

    source: what the windows of `asked` are.  twin: the rounded reference, see `sides.compare`.
    change: without trained tables against with them.  same_source: the checkpoint is the one that was exported.
    is_text: the ids are of a text that was given.  calibrated_on: as many of them are of the calibration's.
    """

    checkpoint: DijiangModel
    recipe: Recipe
    source: str
    asked: Asked
    twin: Found
    change: Sums | None
    same_source: bool
    is_text: bool
    calibrated_on: int

    def report(self, graph: str, run: Run, side: Found) -> Parity:
        """Of one graph: what it computed, and how far that is from the reference."""
        found, states, twin = side.sums.result(is_text=self.is_text), side.states, self.twin
        far, rounded_far = (
            None if self.asked.far is None else each.far.result(is_text=False).rms_relative_error
            for each in (side, twin)
        )
        report = Parity(
            tokens=sum(map(len, self.asked.windows)),
            positions=max(map(len, self.asked.windows)),
            text=self.source,
            learned=_has_learned(self.source, found, self.checkpoint.spec.vocab_size),
            judged=not (self.recipe.in_blocks and self.checkpoint.checkpoint.untrained),
            logits=found,
            rounded=twin.sums.result(is_text=self.is_text),
            rounded_state=float(np.max(twin.states[max(twin.states)][:EARLY])),
            median_kl=float(np.median(side.sums.row_kl)),
            rounded_kl=float(np.median(twin.sums.row_kl)),
            step_error=run.stepped.max_error,
            step_rms=run.stepped.rms,
            steps=run.stepped.tokens,
            padded_error=None if run.padded is None else run.padded.max_error,
            padded_rms=None if run.padded is None else run.padded.rms,
            column_error=side.sums.worst_column,
            rounded_column=twin.sums.worst_column,
            far_position=self.asked.far,
            far_error=far,
            rounded_far=rounded_far,
            state_errors=tuple(StateError(n, float(np.max(e)), int(np.argmax(e))) for n, e in states.items()),
            layer_errors=tuple(states[max(states)]),
            decay_change=None if self.change is None else self.change.result(is_text=self.is_text),
            same_source=self.same_source,
            calibrated_on=self.calibrated_on,
            reference_dtype="float64",
            dijiang=__version__,
            graph=graph,
            detail=self._detail(side),
        )
        return replace(report, gates=judge(self.recipe.gates, report.metrics))

    def _detail(self, side: Found) -> Detail:
        return Detail(
            ids=tuple(int(token) for window in self.asked.windows for token in window),
            positions=tuple(position for window in self.asked.windows for position in range(len(window))),
            errors=tuple(side.sums.row_errors),
            kl=tuple(side.sums.row_kl),
            states=side.states,
            decays=tuple(self.checkpoint.decays),
        )


def _has_learned(source: str, found: Difference, vocabulary: int) -> bool:
    """Whether ids are text to a model that finds `found` on them."""
    if source in (OWN, RANDOM):
        return source == OWN and bool(np.exp(found.reference_entropy) < LEARNED * vocabulary)
    return True
