"""How far a bundle is from its checkpoint in float64: `dijiang verify`.

The bundle runs first, in parts if it is large, and its last session is dropped; then the reference
runs layer by layer. So the memory is that of a part or of one float64 layer, whichever is larger, plus
the logits compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import store_parity
from ..errors import ParityError
from ..graph.precision import PRECISIONS
from ..models.load import DecayMode, DijiangModel, load_checkpoint
from ..progress import Progress, silent
from ..runtime.model import load
from ..version import __version__
from .difference import Difference
from .emulation import load_emulated
from .gates import Verdict, judge
from .parts import PartedModel
from .sides import compare, decay_change, run_bundle
from .windows import OWN, RANDOM, windows_of

#: Positions a window has at most: perplexity is over non-overlapping windows.
WINDOW = 512
#: Tokens compared at most unless asked for more.
TOKENS = 4096
#: Tokens decoded one at a time at most.
STEPS = 128
#: Multiply-adds of the reference that the default slice costs at most (2e10 a second on 2 cores), on
#: random ids and on a text, where perplexity needs many tokens; of decoding one at a time; and the
#: fewest tokens, whatever they cost.
BUDGET, TEXT_BUDGET, STEP_BUDGET, FEWEST = 1.5e11, 6e11, 2e10, 32
#: Layers whose states tell a wrong weight before depth amplifies rounding: the second one sees all of
#: the first.
EARLY = 2
#: exp(entropy) of a model's own next tokens, as a share of its vocabulary, below which it has learned
#: something. Random weights: 0.4 to 1; the two trained checkpoints: 0.016 and 0.03.
LEARNED = 0.1


@dataclass(frozen=True)
class StateError:
    """RMS-relative error of the worst layer's state after `length` tokens."""

    length: int
    rms_relative_error: float
    layer: int


@dataclass(frozen=True)
class Parity:
    """The report of one verification.

    tokens, positions: tokens compared, and the positions 0 .. positions - 1 they stood at.
    learned: whether they are text to this model: from a file, or drawn by one that is no longer random.
    step_error: largest difference between the logits of one-token-at-a-time decoding and of the
    prefill, over the first `steps` tokens.  state_errors: on the way through the first window.
    layer_errors: each layer's at its end; what a layer adds to the residual shows in the next one's.
    decay_change: the reference without its trained D1/D2 against the one with them, for
    `--decay analytic` exports of trained tables.
    """

    tokens: int
    positions: int
    text: str
    learned: bool
    logits: Difference
    step_error: float
    steps: int
    state_errors: tuple[StateError, ...]
    layer_errors: tuple[float, ...]
    decay_change: Difference | None
    same_source: bool
    reference_dtype: str
    dijiang: str
    gates: tuple[Verdict, ...] = ()

    @property
    def metrics(self) -> dict[str, float | None]:
        """What gates are about; larger is worse. None: not measured."""
        d = self.logits
        return {
            "max_error": d.max_error,
            "step_error": self.step_error,
            "rms_relative_error": d.rms_relative_error,
            "kl": d.kl,
            "kl_on_text": d.kl if self.learned else None,
            "early_state_error": max(self.layer_errors[:EARLY]),
            "top1_disagreement": None if d.perplexity is None else 1 - d.top1_agreement,
            "perplexity_change": d.perplexity_change,
        }

    @property
    def worst_layer(self) -> int:
        """The layer whose state is furthest off, relative to its size."""
        return int(np.argmax(self.layer_errors))

    @property
    def failures(self) -> tuple[str, ...]:
        """Gates that were not met."""
        return tuple(
            f"{v.metric} {v.found:.2e}, allowed {v.bound:.1e}" for v in self.gates if not v.passed
        )

    @property
    def passed(self) -> bool:
        """Whether every gate was met."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as stored in the bundle."""
        return asdict(self) | {"worst_layer": self.worst_layer, "passed": self.passed}

    def require(self, advice: str = "do not ship it: report the checkpoint and these figures") -> None:
        """Raise ParityError unless every gate was met."""
        if self.failures:
            worst = f"layer {self.worst_layer} is the worst ({max(self.layer_errors):.1e} off)"
            raise ParityError(
                f"the bundle differs from its checkpoint: {'; '.join(self.failures)}; {worst}; {advice}"
            )


def verify(
    bundle: str | Path,
    against: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    store: bool = True,
    check_hashes: bool = True,
    progress: Progress = silent,
) -> Parity:
    """Compare a bundle with the checkpoint it came from, in float64.

    Args:
        bundle: folder written by `export`.
        against: checkpoint folder.
        text: file to measure on; None: random token ids, or for integer weights text that the bundle
            draws itself; and no perplexity.
        tokens: how many tokens of it at most, None: as many as a model of this size does in
            reasonable time. Their logits are kept: tokens * vocabulary * 4 bytes.
        provider: what runs the bundle; the CPU rounds fp16 and bf16 as a GPU would.
        threads: of the session; None: as many as usable cores.
        store: put the report into the bundle.
        check_hashes: compare every file of the bundle with its manifest first.
        progress: told about the tokens drawn, and about the bytes of weights that are through.

    Returns:
        The report; `report.require()` raises if a gate of the bundle's precision was not met.
    """
    load_here = load_emulated if provider == "cpu" else partial(load, provider=provider)
    model = load_here(bundle, threads=threads, check_hashes=check_hashes)
    opened, manifest = model.bundle, model.manifest
    mode: DecayMode = "analytic" if manifest.decay == "analytic" else "exact"
    checkpoint = load_checkpoint(against, decay=mode, repair_decay=manifest.decay == "repaired")
    parameters = checkpoint.parameters
    count, window = default_slice(checkpoint, text=text is not None)
    own = PRECISIONS[manifest.precision].quantized
    if own and text is None and isinstance(model, PartedModel):
        count = FEWEST  # each token that is drawn costs loading all parts
    count = count if tokens is None else tokens
    source, windows = windows_of(model, text, count, window, own=own, progress=progress)
    run = run_bundle(model, windows, _affordable(STEP_BUDGET, parameters, STEPS))
    del model  # and with it the session's weights
    logits, states = compare(checkpoint, windows, run, progress)
    change = None
    if mode == "analytic":
        stored = load_checkpoint(against, repair_decay=True)
        change = decay_change(stored, checkpoint, windows) if stored.positions_limit else None
    is_text = text is not None
    found = logits.result(is_text=is_text)
    report = Parity(
        tokens=sum(map(len, windows)),
        positions=max(map(len, windows)),
        text=source,
        learned=_has_learned(source, found, checkpoint.spec.vocab_size),
        logits=found,
        step_error=run.step_error,
        steps=run.steps,
        state_errors=tuple(StateError(n, max(e), int(np.argmax(e))) for n, e in states.items()),
        layer_errors=tuple(states[max(states)]),
        decay_change=None if change is None else change.result(is_text=is_text),
        same_source=checkpoint.checkpoint.sha256() == manifest.source_sha256,
        reference_dtype="float64",
        dijiang=__version__,
    )
    report = replace(report, gates=judge(manifest.precision, report.metrics))
    if store:
        store_parity(opened, report.to_dict())
    return report


def default_slice(model: DijiangModel, *, text: bool) -> tuple[int, int]:
    """(tokens that a verification compares, tokens of a window) unless asked for more."""
    window = min(model.positions_limit or WINDOW, model.spec.max_positions, WINDOW)
    budget, most = (TEXT_BUDGET, TOKENS) if text else (BUDGET, window)
    return _affordable(budget, model.parameters, most), window


def _affordable(budget: float, parameters: int, most: int) -> int:
    """Tokens whose multiply-adds fit a budget."""
    return int(np.clip(budget / parameters, FEWEST, most))


def _has_learned(source: str, found: Difference, vocabulary: int) -> bool:
    if source in (OWN, RANDOM):
        return source == OWN and bool(np.exp(found.reference_entropy) < LEARNED * vocabulary)
    return True
