"""What a bundle holds beside its graphs: tokenizer, manifest, card and signature."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from ..bundle.calibrated import CalibrationText
from ..bundle.integrity import record_file
from ..bundle.manifest import TOKENIZER_FILES, GraphRecord, Manifest, fingerprint_of
from ..bundle.opened import Bundle, open_any
from ..bundle.signature import sign as make_signature
from ..errors import CheckpointError
from ..graph.reads import parameter_reads
from ..models.load import DijiangModel
from ..models.tokenizer import TOKENIZER
from ..reading import given, read_regular
from ..recipe import GRAPHS, Recipe
from ..version import __version__
from .card import CARD, model_card


def complete(
    folder: Path,
    model: DijiangModel,
    tokenizer: bytes | None,
    recipe: Recipe,
    graphs: Mapping[str, ir.Model],
    key: str | Path | None,
    calibration: CalibrationText | None,
) -> Bundle:
    """A folder of graphs as a bundle; key: of OpenSSH, to sign with."""
    if tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer)
    for name in TOKENIZER_FILES:
        if os.path.isfile(source := model.path / name):
            (folder / name).write_bytes(given(source, read_regular, CheckpointError, "make it readable"))
    manifest = replace(_manifest(model, folder, recipe, graphs), calibration=calibration)
    (folder / CARD).write_text(model_card(manifest), encoding="utf-8")
    if key is not None:
        manifest = replace(manifest, signature=make_signature(manifest.signed_part(), key))
    Bundle(folder, manifest).with_manifest(manifest)
    return open_any(folder, None, check_hashes=False)


def _manifest(model: DijiangModel, folder: Path, recipe: Recipe, graphs: Mapping[str, ir.Model]) -> Manifest:
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
        fingerprint=fingerprint_of(checkpoint.tensors_sha256(), model.spec, model.decay_mode),
        spec=model.spec,
        recipe=recipe,
        graphs=records,
        decay=model.decay_mode,
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
