"""How far a bundle is from its checkpoint in float64: `dijiang verify`.

The bundle runs first, in parts if it is large, and its last session is dropped; then the reference
runs layer by layer. So the memory is that of a part or of one float64 layer, whichever is larger, plus
the logits compared.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.opened import Bundle, open_bundle, store_parity
from ..errors import BundleError, ParityError
from ..models.decay import Decay, position_limit
from ..models.load import DecayMode, DijiangModel, load_checkpoint
from ..progress import Progress, silent
from ..recipe import require
from ..runtime.model import Model
from ..runtime.options import Loading
from ..runtime.sessions.inference import why_not
from ..runtime.sessions.providers import choose_graph, emulates, open_session, parse
from ..version import __version__
from .difference import Difference
from .emulation import load_emulated
from .gates import Verdict, judge
from .parts import PartedModel
from .rounded import Rounded
from .sides import Found, Run, compare, decay_change, run_bundle
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
#: Rounding of one number of float32.
FLOAT32_EPSILON = float(np.finfo(np.float32).eps) / 2
#: Fields of a spec that change no logits.
WORDS = ("bos_token_id", "eos_token_ids")


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
    and of the prefill, over the first `steps` tokens.  state_errors: on the way through the first window.
    layer_errors: each layer's at its end; what a layer adds to the residual shows in the next one's.
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
    state_errors: tuple[StateError, ...]
    layer_errors: tuple[float, ...]
    decay_change: Difference | None
    same_source: bool
    reference_dtype: str
    dijiang: str
    graph: str
    detail: Detail | None = field(default=None, compare=False, repr=False)
    gates: tuple[Verdict, ...] = ()
    others: tuple[Parity, ...] = ()

    @property
    def metrics(self) -> dict[str, float | None]:
        """What gates are about; larger is worse. None: not measured."""
        d, judged, early = self.logits, self.judged, max(self.layer_errors[:EARLY])
        over = self._over(d.rms_relative_error)
        middle = self.median_kl / max(self.rounded_kl, FLOAT32_EPSILON**2)  # KL is quadratic
        return {
            "max_error": d.max_error,
            "step_error": self.step_error,
            "error_over_float32": over,
            "step_over_float32": self._over(self.step_rms / d.reference_rms),
            "error_over_rounding": over,
            "state_over_rounding": early / max(self.rounded_state, FLOAT32_EPSILON),
            "kl_over_rounding": middle if self.learned and judged else None,
            "rms_relative_error": d.rms_relative_error,
            "kl": d.kl,
            "kl_on_text": d.kl if self.learned and judged else None,
            "early_state_error": early,
            "top1_disagreement": 1 - d.top1_agreement if judged and d.perplexity is not None else None,
            "perplexity_change": d.perplexity_change if judged else None,
        }

    def _over(self, error: float) -> float:
        """An error in units of what rounding costs; at least of the rounding of one number in float32."""
        return error / max(self.rounded.rms_relative_error, FLOAT32_EPSILON)

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
        """JSON-ready form, as stored in the bundle."""
        others = [other.to_dict() for other in self.others]
        stored = asdict(replace(self, detail=None, others=()))
        del stored["detail"]
        return stored | {"worst_layer": self.worst_layer, "passed": self.passed, "others": others}

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
    graph: str | None = None,
    threads: int | None = None,
    store: bool = True,
    require_signature: str | Path | None = None,
    progress: Progress = silent,
) -> Parity:
    """Compare the graphs of a bundle with the checkpoint it came from, in float64.

    Args:
        bundle: folder written by `export`.
        against: checkpoint folder.
        text: file to measure on; None: random token ids, or for integer weights text that the bundle
            draws itself; and no perplexity.
        tokens: how many tokens of it at most, None: as many as a model of this size does in
            reasonable time. Their logits are kept: tokens * vocabulary * 4 bytes a graph.
        provider: what runs the bundle; the CPU rounds fp16 and bf16 as a GPU would.
        graph: only this one; None: all that run here.
        threads: of the session; None: as many as usable cores.
        store: put the report into the bundle, if it is about the checkpoint that it was exported from.
        require_signature: file of public keys, see `load`.
        progress: told about the tokens drawn, and about the bytes of weights that are through.

    Returns:
        The report of the first graph, with those of the others; `report.require()` raises if a gate of
        the bundle's precision was not met.

    Raises:
        BundleError: the report is to be stored, and the bundle cannot be written. Nothing is compared then.
    """
    opened = open_bundle(bundle, require_signature=require_signature)
    if store and not os.access(opened.path, os.W_OK):  # said now: a report that cannot be kept would be lost
        raise BundleError(f"{opened.path}: cannot be written; make it writable, or verify with store=False")
    report = compare_bundle(opened, against, text, tokens, provider, graph, threads, progress)
    if store:
        store_report(opened, report)
    return report


def compare_bundle(
    opened: Bundle,
    against: str | Path,
    text: str | Path | None = None,
    tokens: int | None = None,
    provider: str = "cpu",
    graph: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Parity:
    """`verify` of a bundle that was opened; nothing is stored."""
    Loading(provider=provider, threads=threads)
    manifest, recipe = opened.manifest, opened.manifest.recipe
    graphs = _graphs(opened, provider, graph)
    checkpoint = checkpoint_of(opened, against)
    parameters = checkpoint.parameters
    count, window = default_slice(checkpoint, text=text is not None)
    own, model = recipe.in_blocks, _load(opened, graphs[0], provider, threads)
    if own and text is None and isinstance(model, PartedModel):
        count = FEWEST  # each token that is drawn costs loading all parts
    count = count if tokens is None else tokens
    source, windows = windows_of(model, text, count, window, own=own, progress=progress)
    steps = _affordable(STEP_BUDGET, parameters, STEPS)
    runs = [run_bundle(model, windows, steps)]
    for name in graphs[1:]:
        del model  # one session's weights at a time
        model = _load(opened, name, provider, threads)
        runs.append(run_bundle(model, windows, steps))
    del model
    change, is_text = None, text is not None
    compared, twin = compare(checkpoint, windows, runs, Rounded(checkpoint, recipe), progress)
    if manifest.decay == "analytic":
        stored = load_checkpoint(against, repair_decay=True)
        change = decay_change(stored, checkpoint, windows) if position_limit(stored.decays) is not None else None
    same = checkpoint.checkpoint.sha256() == manifest.source_sha256
    judged = not (recipe.in_blocks and checkpoint.untrained)

    ids = tuple(int(token) for window in windows for token in window)
    positions = tuple(position for window in windows for position in range(len(window)))

    def report_of(name: str, run: Run, side: Found) -> Parity:
        found, states = side.sums.result(is_text=is_text), side.states
        report = Parity(
            tokens=sum(map(len, windows)),
            positions=max(map(len, windows)),
            text=source,
            learned=_has_learned(source, found, checkpoint.spec.vocab_size),
            judged=judged,
            logits=found,
            rounded=twin.sums.result(is_text=is_text),
            rounded_state=max(twin.states[max(twin.states)][:EARLY]),
            median_kl=float(np.median(side.sums.row_kl)),
            rounded_kl=float(np.median(twin.sums.row_kl)),
            step_error=run.step_error,
            step_rms=run.step_rms,
            steps=run.steps,
            state_errors=tuple(StateError(n, max(e), int(np.argmax(e))) for n, e in states.items()),
            layer_errors=tuple(states[max(states)]),
            decay_change=None if change is None else change.result(is_text=is_text),
            same_source=same,
            reference_dtype="float64",
            dijiang=__version__,
            graph=name,
            detail=Detail(
                ids,
                positions,
                tuple(side.sums.row_errors),
                tuple(side.sums.row_kl),
                states,
                tuple(checkpoint.decays),
            ),
        )
        return replace(report, gates=judge(recipe.gates, report.metrics))

    reports = [report_of(*each) for each in zip(graphs, runs, compared, strict=True)]
    return replace(reports[0], others=tuple(reports[1:]))


def store_report(bundle: Bundle, report: Parity) -> bool:
    """Keep a report in the bundle; False, and nothing is kept, if it is about another checkpoint.

    Raises:
        BundleError: it cannot be written.
    """
    if report.same_source:
        verdicts = [(one.graph, replace(one, others=()).passed) for one in report.each]
        store_parity(bundle, report.to_dict(), verdicts)
    return report.same_source


def _graphs(bundle: Bundle, provider: str, graph: str | None) -> list[str]:
    """What is verified: the graph asked for, or every one that the provider runs here."""
    records = bundle.manifest.graphs
    if not emulates(provider):
        return [choose_graph(bundle, parse(bundle, provider)[0], graph)]
    if graph is not None:
        require("graph", graph, records)
        return [graph]
    return [name for name, record in records.items() if not why_not(name, record.oldest)] or list(records)[:1]


def _load(bundle: Bundle, graph: str, provider: str, threads: int | None) -> Model:
    if emulates(provider):
        return load_emulated(bundle, graph, threads=threads)
    return Model(bundle, open_session(bundle, Loading(provider, graph, threads)))


def checkpoint_of(bundle: Bundle, folder: str | Path) -> DijiangModel:
    """The checkpoint of a bundle, with the decay that it was exported with.

    Raises:
        CheckpointError: it cannot be read.
        ParityError: it has another shape than the bundle.
    """
    mode: DecayMode = "analytic" if bundle.manifest.decay == "analytic" else "exact"
    checkpoint = load_checkpoint(folder, decay=mode, repair_decay=bundle.manifest.decay == "repaired")
    ours, theirs = bundle.manifest.spec.to_dict(), checkpoint.spec.to_dict()
    changed = [name for name in ours if ours[name] != theirs[name] and name not in WORDS]
    if changed:
        name = changed[0]
        raise ParityError(
            f"{checkpoint.path} is another model: its {name} is {theirs[name]}, the bundle's "
            f"{ours[name]}; give the checkpoint that the bundle was exported from"
        )
    return checkpoint


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
