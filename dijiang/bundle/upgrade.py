"""From bundle format 1 to 2, without the checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import BundleError, DijiangError, reason
from ..models.spec import ModelSpec
from ..reading import read_json
from ..recipe import Recipe, resolve
from .graphs import check_graphs
from .integrity import FileRecord, record_file, sha256
from .manifest import DATA, MANIFEST, PARITY, GraphRecord, Manifest, fingerprint_of
from .opened import Bundle, open_bundle

#: What format 1 called its one graph, whatever its form.
OLD_GRAPH = "model.onnx"


def upgrade(path: str | Path) -> Bundle:
    """Rewrite a bundle's manifest in place; a bundle of this format is left as it is.

    The old files are checked against the old hashes first. They stay, under the names that they have: the
    manifest alone is replaced, in one step.

    Raises:
        BundleError: not a bundle of format 1, damaged, or not writable.
    """
    folder = Path(path)
    try:
        old = read_json(folder / MANIFEST)
        is_old = old["format_version"] == 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder / MANIFEST}: unreadable ({reason(error)}); export again") from error
    if not is_old:
        return open_bundle(folder)
    try:
        recipe = _recipe(old)
        manifest = _manifest(folder, old, recipe)
        check_graphs(folder, manifest)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, DijiangError) as error:
        raise BundleError(f"{folder}: not a whole bundle of format 1 ({reason(error)}); export again") from error
    return Bundle(folder, manifest).with_manifest(manifest)


def _recipe(old: dict[str, Any]) -> Recipe:
    """What format 1 said in single words."""
    graph = str(old["dialect"])
    return resolve(str(old["precision"]), graph=graph, target=str(old.get("target", "onnxruntime")))


def _manifest(folder: Path, old: dict[str, Any], recipe: Recipe) -> Manifest:
    graph, spec, decay = recipe.graphs[0], ModelSpec.from_dict(old["spec"]), str(old["decay"])
    files: dict[str, FileRecord] = {}
    for name, digest in old["files"].items():
        if Path(name).name != name:
            raise ValueError(f"file name {name!r} leaves the bundle folder")
        if name == PARITY:
            continue
        if sha256(folder / name, 0, sys.maxsize) != digest:
            raise ValueError(f"{name} has another sha256 than the manifest says")
        files[name] = record_file(folder / name)
    if absent := {DATA, OLD_GRAPH} - files.keys():
        raise ValueError(f"no {' and no '.join(sorted(absent))}")
    verified = PARITY in old["files"]
    report = read_json(folder / PARITY) if verified else {}
    record = GraphRecord(
        file=OLD_GRAPH,
        in_place=bool(old["in_place"]),
        onnxruntime=".".join(map(str, recipe.onnxruntime(graph))),
        providers=recipe.providers(graph),
        reads=dict(old.get("reads", {})),
        passed=bool(report["passed"]) if verified else None,
    )
    return Manifest(
        fingerprint=fingerprint_of(str(old["source_sha256"]), spec, decay),
        spec=spec,
        recipe=recipe,
        graphs={graph: record},
        decay=decay,
        positions_limit=old["positions_limit"],
        limit_reason=old["limit_reason"],
        source_sha256=str(old["source_sha256"]),
        versions=dict(old["versions"]),
        warnings=tuple(old["warnings"]),
        files=files,
        reports=(PARITY,) if verified else (),
        engines=dict(old.get("engines", {})),
        parameters=int(old.get("parameters", 0)),
    )
