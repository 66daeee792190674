"""From a checkpoint folder to a bundle folder, whole or not at all."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from .. import __version__
from ..errors import ExportError
from ..models.load import DecayMode, DijiangModel, load_checkpoint
from ..runtime.bundle import (
    DATA,
    GRAPH,
    MANIFEST,
    TOKENIZER_FILES,
    Bundle,
    Manifest,
    sha256,
    write_manifest,
)
from .attention import DIALECTS, runs_here
from .graph import build_graph

PRECISIONS = ("fp32",)
#: What runs the bundle -> the dialect it is written in; `auto` asks the installed onnxruntime.
TARGETS = {"onnxruntime": "auto", "tensorrt": "primitive"}
#: What a bundle needs on disk beside its weights: graph, tokenizer, tables.
SPARE_BYTES = 1 << 20


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    dialect: str = "auto",
    target: str = "onnxruntime",
    decay: DecayMode = "exact",
    repair_decay: bool = False,
    force: bool = False,
) -> Bundle:
    """Write the recurrent-step graph of a DiJiang checkpoint as a bundle.

    Args:
        checkpoint: folder of the published layout.
        output: folder to create; its parent must exist.
        precision: of the weights: `fp32`.
        dialect: `ort` (onnxruntime >= 1.30), `onnx` (opset 27), `primitive` (TensorRT, old
            onnxruntime), or `auto`: what the target runs.
        target: `onnxruntime`: `ort`, unless the installed one needs `primitive`; `tensorrt`:
            `primitive`, ready for `dijiang build`.
        decay: `exact` keeps trained D1/D2; `analytic` drops them and with them the position limit.
        repair_decay: a key scale of 1 where a trained D2 was lost to overflow, instead of an error.
        force: replace a bundle that is already there.

    Raises:
        CheckpointError: the checkpoint does not fit.
        ExportError: the output cannot be written, or an option is unknown.
    """
    dialect = _dialect(dialect, target)
    if precision not in PRECISIONS:
        raise ExportError(f"precision {precision!r} is unknown, expected one of {', '.join(PRECISIONS)}")
    folder = Path(output)
    _check_target(folder, force=force)
    model = load_checkpoint(checkpoint, decay=decay, repair_decay=repair_decay)
    graph = build_graph(model, dialect)
    with _new_folder(folder) as partial:
        _check_space(partial, graph)
        ir.save(graph, partial / GRAPH, external_data=DATA, max_workers=1)
        for name in TOKENIZER_FILES:
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, partial / name)
        manifest = _manifest(model, partial, precision, dialect, "repaired" if repair_decay else decay)
        write_manifest(partial, manifest)
    return Bundle(folder, manifest)


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
    limit = model.positions_limit
    reason = f"D1 and D2 of this checkpoint were trained and stored for {limit} positions"
    return Manifest(
        spec=model.spec,
        dialect=dialect,
        precision=precision,
        decay=decay,
        positions_limit=limit,
        limit_reason=None if limit is None else reason,
        in_place=DIALECTS[dialect].in_place,
        state={
            "layers": model.spec.num_layers,
            "shape": list(model.spec.state_shape),
            "dtype": "float32",
            "bytes": model.spec.state_bytes,
        },
        source_sha256=model.checkpoint.sha256(),
        versions={
            "dijiang": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "onnx", "onnx-ir")},
        },
        warnings=tuple(note for d in model.decays for note in d.notes),
        files={file.name: sha256(file) for file in sorted(folder.iterdir())},
    )


def _check_target(target: Path, *, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise ExportError(f"{target} exists and is never overwritten; use --force or another folder")
    if not (target / MANIFEST).is_file():
        raise ExportError(f"{target} exists and is no bundle, expected {MANIFEST} in it; move it away")


def _check_space(folder: Path, graph: ir.Model) -> None:
    sizes = (v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value)
    need, free = sum(sizes) + SPARE_BYTES, shutil.disk_usage(folder).free
    if need > free:
        raise ExportError(
            f"{folder.parent}: the bundle needs {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; "
            "free some space or choose another disk"
        )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block ends well, else vanishes.

    A killed process leaves a hidden folder without a manifest: nothing that loads.
    """
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    replaced = target.parent / f".{target.name}.{os.getpid()}.replaced"
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except OSError as error:
        raise ExportError(
            f"{target}: cannot be written ({error.strerror or error}); "
            "free some space, or choose a folder that exists and is yours"
        ) from error
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
