"""How far a bundle is from its checkpoint in float64: `dijiang verify`.

The bundle runs first, in parts if it is large, and its last session is dropped; then the reference
runs layer by layer. So the memory is that of a part or of one float64 layer, whichever is larger, plus
the logits compared.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..bundle.opened import Bundle, open_bundle, store_parity
from ..errors import BundleError, ParityError
from ..models.decay import position_limit
from ..models.load import DecayMode, DijiangModel, load_checkpoint
from ..progress import Progress, silent
from ..runtime.model import Model
from ..runtime.options import Loading
from ..runtime.sessions.inference import why_not
from ..runtime.sessions.providers import choose_graph, emulates, open_session, parse
from .asked import Asked, far_start, run_bundle, with_calls
from .comparison import Comparison
from .difference import Sums
from .emulation import load_emulated, rounds_inputs
from .findings import Parity
from .parts import PartedModel
from .rounded import Rounded
from .sides import compare, decay_change
from .windows import windows_of

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
#: Fields of a spec that change no logits.
WORDS = ("bos_token_id", "eos_token_ids")


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
    loading = Loading(provider=provider, threads=threads)
    manifest, recipe = opened.manifest, opened.manifest.recipe
    graphs = _graphs(opened, provider, graph)
    checkpoint = checkpoint_of(opened, against)
    count, window = default_slice(checkpoint, text=text is not None)
    own, model = recipe.in_blocks, _load(opened, replace(loading, graph=graphs[0]))
    if own and text is None and isinstance(model, PartedModel):
        count = FEWEST  # each token that is drawn costs loading all parts
    count = count if tokens is None else tokens
    source, windows = windows_of(model, text, count, window, own=own, progress=progress)
    steps = _affordable(STEP_BUDGET, checkpoint.parameters, STEPS)
    far = far_start((manifest.positions_limit, checkpoint.positions_limit), max(map(len, windows)))
    asked = Asked(windows, steps, far)
    runs = []
    for name in graphs:
        if name != graphs[0]:
            model = _load(opened, replace(loading, graph=name))
        exact = not (emulates(provider) and rounds_inputs(recipe, name))
        run = run_bundle(model, asked, exact=exact)
        del model  # one session's weights at a time
        if not exact:
            run = with_calls(run, load_emulated(opened, name, threads=threads, exact=True), asked)
        runs.append(run)
    compared, twin = compare(checkpoint, asked, runs, Rounded(checkpoint, recipe), progress)
    common = Comparison(
        checkpoint,
        recipe,
        source,
        asked,
        twin,
        change=_tables_dropped(checkpoint, against, windows) if manifest.decay == "analytic" else None,
        same_source=checkpoint.checkpoint.sha256() == manifest.source_sha256,
        is_text=text is not None,
        calibrated_on=0 if manifest.calibration is None else manifest.calibration.shared(np.concatenate(windows)),
    )
    reports = [common.report(*each) for each in zip(graphs, runs, compared, strict=True)]
    return replace(reports[0], others=tuple(reports[1:]))


def _tables_dropped(checkpoint: DijiangModel, against: str | Path, windows: Sequence[np.ndarray]) -> Sums | None:
    """What it changes that trained tables of a checkpoint are not used; None: it has none."""
    stored = load_checkpoint(against, repair_decay=True)
    return None if position_limit(stored.decays) is None else decay_change(stored, checkpoint, windows)


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
        bundle.require_graph(graph)
        return [graph]
    return [name for name, record in records.items() if not why_not(name, record.oldest)] or list(records)[:1]


def _load(bundle: Bundle, loading: Loading) -> Model:
    if emulates(loading.provider):
        assert loading.graph is not None
        return load_emulated(bundle, loading.graph, threads=loading.threads)
    return Model(bundle, open_session(bundle, loading))


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
