"""From a checkpoint folder to a bundle folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir

from ..bundle.calibrated import CalibrationText
from ..bundle.manifest import TOKENIZER_FILES
from ..bundle.opened import Bundle, open_any
from ..bundle.signature import sign as make_signature
from ..errors import ExportError
from ..files import new_folder, temporary_folder
from ..graph.schemes.nbits import calibrated
from ..models.load import DecayMode, DijiangModel, load_checkpoint
from ..models.store import require_own
from ..models.tokenizer import TOKENIZER, find_tokenizer
from ..parity.verify import compare_bundle, store_report
from ..progress import Progress, silent
from ..recipe import AUTO, Recipe, require, resolve
from ..runtime.options import Loading
from ..runtime.sessions.inference import import_onnxruntime, runs_here, why_not
from . import pipeline
from .budget import require_budget, spend
from .contents import complete
from .plan import Plan, plan_export
from .save import data_bytes, save_graphs
from .target_folder import check_target, foreign
from .texts import Texts


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    graph: str = AUTO,
    target: str = "onnxruntime",
    decay: DecayMode = "exact",
    repair_decay: bool = False,
    head_precision: str | None = None,
    block_size: int | None = None,
    calibration_tokens: int | None = None,
    calibration_text: str | Path | None = None,
    budget: float | None = None,
    verify: bool = True,
    text: str | Path | None = None,
    threads: int | None = None,
    force: bool = False,
    sign: str | Path | None = None,
    progress: Progress = silent,
    dialect: str | None = None,
) -> Bundle:
    """Write the step graphs of a DiJiang checkpoint as a bundle.

    Args:
        checkpoint: folder of the published layout.
        output: folder to create, with its parents.
        precision: a row of `recipe.PRECISIONS`.
        graph: a row of `recipe.GRAPHS`: write only this one; `auto`: those of the target that run here
            and share all weights.
        target: a row of `recipe.TARGETS`.
        decay: `exact` keeps trained D1/D2; `analytic` drops them and with them the position limit.
        repair_decay: a key scale of 1 where a trained D2 was lost to overflow, instead of an error.
        head_precision: of the head; None: as the precision says.
        block_size: input channels that share a scale; None: as the precision says.
        calibration_tokens: to round weights where it changes the outputs least (`calibration`); 0:
            nearest values; None: as many as are worth the time, 0 above 500 million parameters where
            there is no calibration_text.
        calibration_text: UTF-8 file that they are read from; None: the model writes them.
        budget: MB (10^6 bytes) that the weights may have: the projections that lose most by few bits keep 8
            (`exporter.budget`); None: all projections are alike.
        verify: compare every graph with the checkpoint as `parity.verify` does, on a slice that suits
            the model's size, and keep the bundle only if all pass.
        text: file to verify on, for perplexity; None: random token ids.
        threads: of the verification; None: as many as usable cores.
        force: replace a bundle that is already there, if nothing else is in its folder.
        sign: key of OpenSSH to sign the bundle with, see `bundle.signature.sign`; None: it is not signed.
        progress: told about bytes written, and compared.
        dialect: the old name of `graph`.

    Raises:
        CheckpointError: the checkpoint does not fit.
        ExportError: the output cannot be written, or an option is unknown.
        InputError: the key does not sign, a text cannot be read, or threads is out of range.
        ParityError: a graph failed a gate of its precision; nothing is left of the bundle.
    """
    require("decay", decay, get_args(DecayMode))
    if repair_decay and decay != "exact":
        raise ExportError(f"decay {decay} drops the tables: there is none to repair; leave --repair-decay out")
    if dialect is not None and graph not in (AUTO, dialect):
        raise ExportError(f"graph is {graph!r} and dialect, its old name, {dialect!r}; leave dialect out")
    Loading(threads=threads)
    recipe = resolve(
        precision,
        graph=dialect or graph,
        target=target,
        head_precision=head_precision,
        block_size=block_size,
        calibration_tokens=calibration_tokens,
        budget=budget,
        runs_here=runs_here,
    )
    folder = Path(output)
    check_target(
        folder, [Path(path) for path in (checkpoint, text, calibration_text) if path is not None], force=force
    )
    if sign is not None:
        make_signature(b"", sign)  # before minutes are spent on the bundle
    model = load_checkpoint(checkpoint, decay=decay, repair_decay=repair_decay)
    for name in (TOKENIZER, *TOKENIZER_FILES):
        require_own(model.path / name)
    tokenizer = find_tokenizer(model.path, model.spec.vocab_size)
    if verify:
        _check_verifiable(recipe)
    elif text is not None:
        raise ExportError(f"{text} would not be read: nothing is verified; leave --text or --no-verify out")
    texts = Texts.of(model, tokenizer, text, calibration_text)
    recipe = pipeline.fitted(recipe, model, text=calibration_text is not None)
    texts.require_use(recipe)
    graphs = pipeline.step_graphs(model, recipe)
    if recipe.budget is not None:
        require_budget(recipe, pipeline.float_graph(model), data_bytes(graphs))
    with new_folder(folder, ExportError, foreign=foreign if force else None) as partial, ExitStack() as written:
        plan = plan_export(model, graphs, recipe, verify=verify, text=text is not None)
        plan.require(partial)
        calibration = None
        if recipe.calibration_tokens:
            batches = pipeline.sequences(model, recipe, texts.calibration_ids(recipe), progress)
            if texts.calibration is not None:
                calibration = CalibrationText.of(texts.calibration.name, batches)
            recipe, graphs = _calibrated(model, recipe, graphs, batches, written, progress)
        _save(graphs, partial, plan, progress)
        bundle = complete(partial, model, tokenizer, recipe, graphs, sign, calibration)
        del graphs
        if verify:
            report = compare_bundle(bundle, model.path, text=text, threads=threads, progress=progress)
            store_report(bundle, report)
            report.require("nothing was written; look into it with --no-verify and dijiang verify")
    return open_any(folder, None, check_hashes=False)


def _check_verifiable(recipe: Recipe) -> None:
    """Everything that could stop a verification, before minutes are spent on the bundle."""
    import_onnxruntime()
    for graph in recipe.graphs:
        if reason := why_not(graph, recipe.onnxruntime(graph)):
            raise ExportError(
                f"the {graph} graph does not run here, so the bundle cannot be verified: {reason}; "
                "or use --no-verify"
            )


def _calibrated(
    model: DijiangModel,
    recipe: Recipe,
    graphs: Mapping[str, ir.Model],
    batches: Sequence[np.ndarray],
    written: ExitStack,
    progress: Progress,
) -> tuple[Recipe, dict[str, ir.Model]]:
    """The recipe with its budget spent, and graphs whose weights are rounded by their inputs.

    graphs: the same to nearest values.  batches: `pipeline.sequences`.  written: ends after they were saved.
    """
    recipe = recipe.fitted(recipe.embed, sum(ids.size for ids in batches))  # whole sequences only
    moments = pipeline.calibrate(model, recipe, batches)
    rounder = calibrated(moments)
    if recipe.budget is not None:
        store, smallest = written.enter_context(temporary_folder()), data_bytes(graphs)
        recipe, rounder = spend(recipe, pipeline.float_graph(model), moments, smallest, store, progress)
    return recipe, pipeline.step_graphs(model, recipe, rounder)


def _save(graphs: Mapping[str, ir.Model], folder: Path, plan: Plan, progress: Progress) -> None:
    total, stage, most = data_bytes(graphs), f"write {plan}", 0

    def through(offset: int) -> None:
        nonlocal most
        most = max(most, offset)  # two writers may come in any order
        progress(stage, most, total)

    save_graphs(graphs, folder, plan.writers, through)
    progress(stage, total, total)
