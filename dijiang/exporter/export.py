"""From a checkpoint folder to a bundle folder, whole or not at all."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import onnx_ir as ir

from ..bundle.integrity import record_file
from ..bundle.manifest import MANIFEST, TOKENIZER_FILES, GraphRecord, Manifest, fingerprint_of
from ..bundle.opened import Bundle, open_any, read_manifest
from ..bundle.signature import sign as make_signature
from ..errors import CheckpointError, ExportError, InputError
from ..files import check_new, check_output, given, new_folder, read_regular, refuse_foreign, temporary_folder
from ..graph.reads import parameter_reads
from ..graph.schemes.nbits import calibrated
from ..hidden import sweep
from ..models.load import DecayMode, DijiangModel, load_checkpoint
from ..models.tokenizer import TOKENIZER, find_tokenizer
from ..parity.verify import compare_bundle, default_slice, store_report
from ..parity.windows import read_ids
from ..progress import Progress, silent
from ..recipe import AUTO, GRAPHS, Recipe, require, resolve
from ..runtime.options import Loading
from ..runtime.sessions.inference import import_onnxruntime, runs_here, why_not
from ..runtime.text import TextTokenizer
from ..version import __version__
from . import pipeline
from .budget import require_budget, spend
from .card import CARD, model_card
from .plan import Plan, plan_export
from .save import data_bytes, save_graphs


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
    tokenizer = find_tokenizer(model.path, model.spec.vocab_size)
    if verify:
        _check_verifiable(recipe)
    elif text is not None:
        raise ExportError(f"{text} would not be read: nothing is verified; leave --text or --no-verify out")
    reader = None if tokenizer is None else TextTokenizer(tokenizer, model.path / TOKENIZER)
    for file in (text, calibration_text):
        _check_text(model, file, readable=reader is not None)
    if text is not None and reader is not None:
        read_ids(reader, Path(text), default_slice(model, text=True)[0])  # before minutes are spent on the bundle
    recipe = pipeline.fitted(recipe, model, text=calibration_text is not None)
    if calibration_text is not None and not recipe.calibration_tokens:
        none = f"precision {precision} for target {target} is not calibrated"
        reason = "the calibration has 0 tokens" if calibration_tokens == 0 else none
        raise ExportError(f"{calibration_text} would not be read: {reason}; leave --calibration-text out")
    graphs = pipeline.step_graphs(model, recipe)
    smallest = data_bytes(graphs)
    if recipe.budget is not None:
        require_budget(recipe, pipeline.float_graph(model), smallest)
    with new_folder(folder, ExportError, foreign=foreign if force else None) as partial, ExitStack() as written:
        plan = plan_export(model, graphs, recipe, verify=verify, text=text is not None)
        plan.require(partial)
        if recipe.calibration_tokens:
            ids = None
            if calibration_text is not None and reader is not None:
                ids = read_ids(reader, Path(calibration_text), recipe.calibration_tokens)
                recipe = recipe.fitted(recipe.embed, len(ids))  # a short text has fewer
            moments = pipeline.calibrate(model, recipe, ids, progress)
            rounder = calibrated(moments)
            if recipe.budget is not None:
                store = written.enter_context(temporary_folder())
                recipe, rounder = spend(recipe, pipeline.float_graph(model), moments, smallest, store, progress)
            graphs = pipeline.step_graphs(model, recipe, rounder)
        _save(graphs, partial, plan, progress)
        if tokenizer is not None:
            (partial / TOKENIZER).write_bytes(tokenizer)
        for name in TOKENIZER_FILES:
            if os.path.isfile(source := model.path / name):
                (partial / name).write_bytes(given(source, read_regular, CheckpointError, "make it readable"))
        mode = "repaired" if repair_decay else decay
        manifest = _manifest(model, partial, recipe, graphs, mode)
        (partial / CARD).write_text(model_card(manifest), encoding="utf-8")
        if sign is not None:
            manifest = replace(manifest, signature=make_signature(manifest.signed_part(), sign))
        Bundle(partial, manifest).with_manifest(manifest)
        bundle = open_any(partial, None, check_hashes=False)
        del graphs
        if verify:
            report = compare_bundle(bundle, model.path, text=text, threads=threads, progress=progress)
            store_report(bundle, report)
            report.require("nothing was written; look into it with --no-verify and dijiang verify")
    return open_any(folder, None, check_hashes=False)


def check_target(target: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """ExportError if the target may not be written: only a bundle is ever replaced, and only whole."""
    if not force:
        check_new(target, inputs, ExportError, "use --force or another folder")
        return
    check_output(target, inputs, ExportError)
    if os.path.lexists(target):
        refuse_foreign(target, foreign(target), ExportError)


def foreign(folder: Path) -> list[str]:
    """Names in the folder of a bundle that its manifest does not list.

    Raises:
        ExportError: it is no bundle.
        BundleError: its manifest cannot be read.
    """
    if not os.path.isfile(folder / MANIFEST):
        raise ExportError(f"{folder} exists and is no bundle, expected {MANIFEST} in it; move it away")
    sweep(folder)
    old = read_manifest(folder)
    listed = {MANIFEST, *old.files, *old.reports}
    with os.scandir(folder) as found:
        return sorted(one.name for one in found if one.name not in listed or one.is_dir(follow_symlinks=False))


def _check_verifiable(recipe: Recipe) -> None:
    """Everything that could stop a verification, before minutes are spent on the bundle."""
    import_onnxruntime()
    for graph in recipe.graphs:
        if reason := why_not(graph, recipe.onnxruntime(graph)):
            raise ExportError(
                f"the {graph} graph does not run here, so the bundle cannot be verified: {reason}; "
                "or use --no-verify"
            )


def _check_text(model: DijiangModel, text: str | Path | None, *, readable: bool) -> None:
    """InputError if a file is asked for and cannot be read as tokens."""
    if text is None:
        return
    if not readable:
        raise InputError(f"{model.path}: no {TOKENIZER} to read {text} with; leave the text out")
    if not os.path.isfile(text):
        found = "not a regular file" if os.path.exists(text) else "no such file"
        raise InputError(f"{text}: cannot be read ({found}); give a UTF-8 text file")


def _save(graphs: Mapping[str, ir.Model], folder: Path, plan: Plan, progress: Progress) -> None:
    total, stage, most = data_bytes(graphs), f"write {plan}", 0

    def through(offset: int) -> None:
        nonlocal most
        most = max(most, offset)  # two writers may come in any order
        progress(stage, most, total)

    save_graphs(graphs, folder, plan.writers, through)
    progress(stage, total, total)


def _manifest(
    model: DijiangModel, folder: Path, recipe: Recipe, graphs: Mapping[str, ir.Model], decay: str
) -> Manifest:
    records = {
        name: GraphRecord(
            file=GRAPHS[name].file,
            in_place=GRAPHS[name].in_place,
            onnxruntime=".".join(map(str, recipe.onnxruntime(name))),
            providers=recipe.providers(name),
            reads=parameter_reads(graph),
        )
        for name, graph in graphs.items()
    }
    checkpoint = model.checkpoint
    return Manifest(
        fingerprint=fingerprint_of(checkpoint.tensors_sha256(), model.spec, decay),
        spec=model.spec,
        recipe=recipe,
        graphs=records,
        decay=decay,
        positions_limit=model.positions_limit,
        limit_reason=model.limit_reason,
        source_sha256=checkpoint.sha256(),
        parameters=model.parameters,
        versions={
            "dijiang": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "onnx", "onnx-ir")},
        },
        warnings=(*checkpoint.notes, *(note for d in model.decays for note in d.notes)),
        files={file.name: record_file(file) for file in sorted(folder.iterdir())},
        reports=(CARD,),
    )
