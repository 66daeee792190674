"""From a checkpoint folder to a bundle folder, whole or not at all."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path

import onnx_ir as ir

from ..bundle.manifest import (
    DATA,
    GRAPH,
    TOKENIZER,
    TOKENIZER_FILES,
    Bundle,
    Manifest,
    open_bundle,
    sha256,
    write_manifest,
)
from ..errors import ExportError, InputError
from ..graph.attention import DIALECTS, runs_here
from ..graph.passes.types import TYPES
from ..graph.precision import precision_of
from ..graph.reads import parameter_reads
from ..models.load import DecayMode, DijiangModel, load_checkpoint
from ..parity.verify import verify as compare
from ..progress import Progress, silent
from ..runtime.native import operator_library
from ..runtime.sessions.base import import_onnxruntime
from ..version import __version__
from . import pipeline
from .folder import check_target, new_folder
from .plan import Plan, plan_export, weight_bytes

#: What runs the bundle -> the dialect it is written in; `auto` asks the installed onnxruntime.
TARGETS = {"onnxruntime": "auto", "cuda": "ort", "tensorrt": "primitive"}


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    dialect: str = "auto",
    target: str = "onnxruntime",
    decay: DecayMode = "exact",
    repair_decay: bool = False,
    head_precision: str | None = None,
    block_size: int | None = None,
    calibration_tokens: int | None = None,
    verify: bool = True,
    text: str | Path | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Write the recurrent-step graph of a DiJiang checkpoint as a bundle.

    Args:
        checkpoint: folder of the published layout.
        output: folder to create; its parent must exist.
        precision: `fp32`; `int8` or `int4`: weights in blocks of integers (in the primitive dialect, for
            TensorRT, the rest as in fp16); `fp16` or `bf16`: weights and activations in the type,
            recurrence, state and statistics in float32, for CUDA and TensorRT.
        dialect: `ort` (onnxruntime >= 1.30), `native` (the same with our compiled operator, CPU only),
            `onnx` (opset 27), `primitive` (TensorRT, old onnxruntime), or `auto`: what the target runs.
        target: `onnxruntime`: `ort`, unless the installed one needs `primitive`; `cuda`: `ort`, with
            activations in fp16 beside integer weights; `tensorrt`: `primitive`, ready for
            `dijiang build`.
        decay: `exact` keeps trained D1/D2; `analytic` drops them and with them the position limit.
        repair_decay: a key scale of 1 where a trained D2 was lost to overflow, instead of an error.
        head_precision: of the head; None: as `precision.PRECISIONS` says.
        block_size: input channels that share a scale; None: 128.
        calibration_tokens: that the float32 model writes itself, to round weights to 4 bits where it
            changes its outputs least (`calibration`); 0: nearest values; None: as many as are worth
            the time, 0 above 500 million parameters.
        verify: compare the bundle with the checkpoint as `parity.verify` does, on a slice that suits
            the model's size, and keep it only if it passes.
        text: file to verify on, for perplexity; None: random token ids.
        threads: of the verification; None: as many as usable cores.
        force: replace a bundle that is already there.
        progress: told about bytes written, and compared.

    Raises:
        CheckpointError: the checkpoint does not fit.
        ExportError: the output cannot be written, or an option is unknown.
        ParityError: the bundle failed a gate of its precision; nothing is left of it.
    """
    dialect = _dialect(dialect, target)
    rounding = precision_of(precision, head_precision, block_size)
    if rounding.quantized and dialect not in pipeline.INTEGERS:
        raise ExportError(
            f"precision {precision} needs one of the dialects {', '.join(pipeline.INTEGERS)}, "
            f"not {dialect}; leave --dialect out, or export with --precision fp32"
        )
    if dialect == "native" and rounding.type in TYPES:
        raise ExportError(
            f"the native dialect runs on the CPU, which gains nothing from {precision}; "
            "leave --dialect out, or export with --precision int8"
        )
    if dialect == "primitive" and (head_precision or block_size or calibration_tokens):
        raise ExportError(
            "--head-precision, --block-size and --calibration-tokens have no meaning in the primitive "
            "dialect, whose blocks are what TensorRT reads; leave them out"
        )
    folder = Path(output)
    check_target(folder, force=force)
    model = load_checkpoint(checkpoint, decay=decay, repair_decay=repair_decay)
    if verify:
        _check_verifiable(model, dialect, text)
    tokens = pipeline.calibration_tokens(model, dialect, rounding, calibration_tokens)
    on_cuda = target == "cuda"
    graph = pipeline.step_graph(model, dialect, rounding, cuda=on_cuda)
    with new_folder(folder) as partial:
        plan = plan_export(
            model,
            graph,
            precision,
            verify=verify,
            text=text is not None,
            calibration_tokens=tokens,
        )
        plan.require(partial)
        if tokens:
            moments = pipeline.calibrate(model, dialect, tokens, progress)
            graph = pipeline.step_graph(model, dialect, rounding, moments, cuda=on_cuda)
        _save(graph, partial, plan, progress)
        for name in TOKENIZER_FILES:
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, partial / name)
        mode = "repaired" if repair_decay else decay
        manifest = replace(
            _manifest(model, partial, precision, dialect, mode),
            target=target,
            reads=parameter_reads(graph),
        )
        write_manifest(partial, manifest)
        del graph
        if verify:
            report = compare(
                partial, model.path, text=text, threads=threads, check_hashes=False, progress=progress
            )
            report.require("nothing was written; look into it with --no-verify and dijiang verify")
    return open_bundle(folder, check_hashes=False)


def _check_verifiable(model: DijiangModel, dialect: str, text: str | Path | None) -> None:
    """Everything that could stop a verification, before minutes are spent on the bundle."""
    import_onnxruntime()
    if dialect == "native":
        operator_library()
    if not runs_here(dialect):
        raise ExportError(
            f"the {dialect} dialect does not run on the installed onnxruntime, so the bundle cannot be "
            "verified; upgrade onnxruntime, or use --no-verify"
        )
    if text is not None and not (model.path / TOKENIZER).is_file():
        raise InputError(f"{model.path}: no {TOKENIZER} to read {text} with; verify without --text")
    if text is not None and not Path(text).is_file():
        raise InputError(f"{text}: cannot be read (no such file); give a UTF-8 text file")


def _save(graph: ir.Model, folder: Path, plan: Plan, progress: Progress) -> None:
    """Write graph and weights; each weight is computed when its turn comes, and dropped."""
    total, stage, through = weight_bytes(graph), f"write {plan}", 0

    def shown(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        nonlocal through
        through = max(through, info.offset)  # two writers may come in any order
        progress(stage, through, total)

    # onnx-ir before 1.1 has no such option, and one writer.
    together = {"max_workers": plan.writers} if "max_workers" in signature(ir.save).parameters else {}
    ir.save(graph, folder / GRAPH, external_data=DATA, callback=shown, **together)
    progress(stage, total, total)


def _dialect(dialect: str, target: str) -> str:
    """The dialect that was asked for, or the one that the target runs."""
    if target not in TARGETS:
        raise ExportError(f"target {target!r} is unknown, expected one of {', '.join(TARGETS)}")
    if dialect not in ("auto", *DIALECTS):
        raise ExportError(f"dialect {dialect!r} is unknown, expected one of auto, {', '.join(DIALECTS)}")
    wanted = TARGETS[target]
    if "auto" not in (wanted, dialect) and wanted != dialect:
        raise ExportError(
            f"target {target} needs the {wanted} dialect, not {dialect}; leave --dialect out"
        )
    chosen = dialect if wanted == "auto" else wanted
    if chosen != "auto":
        return chosen
    return "ort" if runs_here("ort") else "primitive"


def _manifest(model: DijiangModel, folder: Path, precision: str, dialect: str, decay: str) -> Manifest:
    return Manifest(
        spec=model.spec,
        dialect=dialect,
        precision=precision,
        decay=decay,
        positions_limit=model.positions_limit,
        limit_reason=model.limit_reason,
        in_place=DIALECTS[dialect].in_place,
        state={
            "layers": model.spec.num_layers,
            "shape": list(model.spec.state_shape),
            "dtype": "float32",
            "bytes": model.spec.state_bytes,
        },
        source_sha256=model.checkpoint.sha256(),
        parameters=model.parameters,
        versions={
            "dijiang": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "onnx", "onnx-ir")},
        },
        warnings=tuple(note for d in model.decays for note in d.notes),
        files={file.name: sha256(file) for file in sorted(folder.iterdir())},
    )
