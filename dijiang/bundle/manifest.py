"""The bundle: a folder with the graph, its data, a manifest, tokenizer files and parity report."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import BundleError, CheckpointError
from ..models.spec import ModelSpec

FORMAT_VERSION = 1
MANIFEST = "dijiang.json"
GRAPH = "model.onnx"
DATA = "model.onnx.data"
PARITY = "parity.json"
TOKENIZER = "tokenizer.json"
#: Copied from the checkpoint where present.
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Manifest:
    """What `dijiang.json` says.

    positions_limit: tokens a sequence can have, None: no end; limit_reason says why it ends.
    in_place: the state outputs may be bound to the memory of the state inputs.
    files: sha256 of every other file of the bundle, by its name.
    engines: backend -> `engine.EngineRecord` of the TensorRT engine that `dijiang build` put in.
    parameters: numbers in the checkpoint's weights, D1 and D2 left out; 0: not counted.
    target: what `export` wrote it for: `onnxruntime`, `cuda` or `tensorrt`.
    reads: bytes of parameters: `step`, which every step reads, and `token`, of table rows a token.
    """

    spec: ModelSpec
    dialect: str
    precision: str
    decay: str
    positions_limit: int | None
    limit_reason: str | None
    in_place: bool
    state: dict[str, Any]
    source_sha256: str
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    target: str = "onnxruntime"
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files are all present and whole."""

    path: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.path / GRAPH

    @property
    def nbytes(self) -> int:
        """Size of all files, bytes."""
        return sum((self.path / name).stat().st_size for name in (*self.manifest.files, MANIFEST))

    @property
    def parity(self) -> dict[str, Any] | None:
        """The stored parity report, or None if the bundle was never verified."""
        path = self.path / PARITY
        if PARITY not in self.manifest.files:
            return None
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _manifest(path: Path) -> Manifest:
    again = "export the checkpoint again"
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = data["format_version"]
    except FileNotFoundError:
        raise BundleError(f"{path}: no {MANIFEST}, so not a bundle; run dijiang export first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path / MANIFEST}: unreadable ({error}); {again}") from error
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: bundle format {version}, this dijiang reads {FORMAT_VERSION}; "
            "upgrade dijiang, or export the checkpoint again"
        )
    try:
        data["spec"] = ModelSpec.from_dict(data["spec"])
        data["warnings"] = tuple(data["warnings"])
        data["files"] = {str(name): str(digest) for name, digest in data["files"].items()}
        return Manifest(**data)
    except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as error:
        raise BundleError(f"{path / MANIFEST}: not a whole manifest ({error}); {again}") from error


def _check_name(path: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    inside = (path / name).resolve().parent == path.resolve()
    if len(parts) != 1 or ".." in parts or not inside:
        raise BundleError(
            f"{path}: file name {name!r} leaves the bundle folder, expected a plain name; "
            "do not use this bundle"
        )


def open_bundle(path: str | Path, *, check_hashes: bool = True) -> Bundle:
    """Open and check a bundle folder.

    Args:
        path: folder written by `dijiang export`.
        check_hashes: read every file once and compare its sha256 with the manifest.

    Raises:
        BundleError: missing, damaged, of a newer format, or with files outside the folder.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    for name, expected in manifest.files.items():
        _check_name(folder, name)
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{folder}: {name} is missing; copy or export the bundle again")
        if check_hashes and (found := sha256(file)) != expected:
            raise BundleError(
                f"{file}: sha256 {found[:12]}..., expected {expected[:12]}...; "
                "copy or export the bundle again"
            )
    absent = sorted({GRAPH, DATA} - set(manifest.files))
    if absent:
        raise BundleError(f"{folder}: {', '.join(absent)} not in {MANIFEST}; export the bundle again")
    return Bundle(folder, manifest)


def store_parity(bundle: Bundle, report: dict[str, Any]) -> Bundle:
    """Write the parity report into the bundle; the manifest is replaced last, in one step."""
    file = bundle.path / PARITY
    try:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        manifest = replace(bundle.manifest, files=bundle.manifest.files | {PARITY: sha256(file)})
        write_manifest(bundle.path, manifest)
    except OSError as error:
        raise BundleError(
            f"{bundle.path}: the parity report cannot be stored ({error.strerror or error}); "
            "make the folder writable, or verify with --no-store"
        ) from error
    return Bundle(bundle.path, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `dijiang.json` whole or not at all."""
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(manifest.to_json(), encoding="utf-8")
    temporary.replace(folder / MANIFEST)
