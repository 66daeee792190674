"""`dijiang.json`: what a bundle says about itself. The format: docs/bundle-format.md."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import BundleError, CheckpointError, reason
from ..models.spec import ModelSpec
from ..recipe import Recipe
from ..typed import check_types, unknown_field
from .calibrated import CalibrationText
from .integrity import FileRecord

FORMAT_VERSION = 2
MANIFEST = "dijiang.json"
DATA = "model.onnx.data"
PARITY = "parity.json"
GENERATION = "generation_config.json"
#: What it says of draws, as transformers names it; all but the first are options of a generation, too.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
#: Copied from the checkpoint where present, beside the tokenizer.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION)
AGAIN = "export the checkpoint again"
#: What reading a value of a wrong kind raises.
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
#: Characters that a signature has at most: one by RSA of 16,384 bits has half of it.
SIGNATURE = 10_000
#: Fields of a ModelSpec that say nothing about what a state means. All others do, beside the weights.
NOT_OF_STATES = ("max_positions", "bos_token_id", "eos_token_ids")


@dataclass(frozen=True)
class GraphRecord:
    """One graph of a bundle.

    in_place: the state outputs may be bound to the memory of the state inputs.
    onnxruntime: oldest version that runs it, as in "1.30".  providers: what may run it.
    reads: bytes of parameters: `step`, which every step reads, and `token`, of table rows a token.
    passed: whether it met its gates when it was verified last; None: never verified, or not judged.
    """

    file: str
    in_place: bool
    onnxruntime: str
    providers: tuple[str, ...]
    reads: dict[str, int] = field(default_factory=dict)
    passed: bool | None = None

    @property
    def oldest(self) -> tuple[int, int]:
        """`onnxruntime` as numbers."""
        major, minor = self.onnxruntime.split(".")
        return int(major), int(minor)


@dataclass(frozen=True)
class Manifest:
    """What `dijiang.json` says.

    fingerprint: of the checkpoint, see `fingerprint_of`: states of one run with every bundle of it.
    source_sha256: of the checkpoint's config and tensors.
    positions_limit: tokens a sequence can have, None: no end; limit_reason says why it ends.
    graphs: by name, the best first.  files: of every file that a step or a text depends on, by name.
    reports: names of files that may be missing or change: parity, model card.
    engines: backend -> `sessions.engines.EngineRecord` of the TensorRT engine that `dijiang build` made.
    parameters: numbers in the checkpoint's weights, D1 and D2 left out; 0: not counted.
    calibration: the text that integers were rounded by; None: by no file.
    signature: over `signed_part`, see `bundle.signature`; None: nobody signed it.
    """

    fingerprint: str
    spec: ModelSpec
    recipe: Recipe
    graphs: dict[str, GraphRecord]
    decay: str
    positions_limit: int | None
    limit_reason: str | None
    source_sha256: str
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()
    files: dict[str, FileRecord] = field(default_factory=dict)
    reports: tuple[str, ...] = ()
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: int = 0
    calibration: CalibrationText | None = None
    signature: str | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The file's text; its `digest` tells damage."""
        return json.dumps(self._facts() | {"digest": self.digest()}, indent=1) + "\n"

    def _facts(self) -> dict[str, Any]:
        """As JSON has them. Without a calibration as in bundles of before, which others still read."""
        facts = asdict(self)
        if self.calibration is None:
            del facts["calibration"]
        return facts

    def digest(self) -> str:
        """SHA-256 of `signed_part`."""
        return hashlib.sha256(self.signed_part()).hexdigest()

    def signed_part(self) -> bytes:
        """What a signature is over: all that this says, but for itself and for what `verify` notes later."""
        facts = self._facts()
        del facts["signature"], facts["reports"]
        for record in facts["graphs"].values():
            del record["passed"]
        return json.dumps(facts, sort_keys=True).encode()

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Manifest:
        """Read the value that `to_json` wrote; BundleError, which begins with `where`, for anything else."""
        try:
            version = data["format_version"]
        except (KeyError, TypeError) as error:
            raise BundleError(f"{where}: unreadable ({reason(error)}); {AGAIN}") from error
        if version == 1:
            raise BundleError(
                f"{where}: bundle format 1, this dijiang reads {FORMAT_VERSION}; run dijiang upgrade on the bundle"
            )
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{where}: bundle format {version}, this dijiang reads {FORMAT_VERSION}; "
                "upgrade dijiang, or export the checkpoint again"
            )
        told = {name: value for name, value in data.items() if name != "digest"}
        if (unknown := unknown_field(told, cls)) is not None:
            by = data["versions"].get("dijiang") if isinstance(data.get("versions"), dict) else None
            raise BundleError(
                f"{where}: {unknown} is unknown to this dijiang, {by or 'another one'} wrote it; upgrade dijiang"
            )
        try:
            found = cls(**_typed(told))
            check_types(found)
            if data.get("digest", digest := found.digest()) != digest:  # bundles of before have none
                raise ValueError("its contents are not what its digest says")
            return found
        except (*UNREADABLE, CheckpointError, BundleError) as error:
            raise BundleError(f"{where}: not a whole manifest ({reason(error)}); {AGAIN}") from error


def _typed(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Manifest from its JSON."""
    graphs = {str(name): _graph_record(entry) for name, entry in data["graphs"].items()}
    limit = data["positions_limit"]
    recipe = Recipe.from_dict(data["recipe"])
    if tuple(graphs) != recipe.graphs:
        raise ValueError(f"graphs {', '.join(graphs)}, the recipe says {', '.join(recipe.graphs)}")
    files = {
        str(name): FileRecord(int(entry["bytes"]), tuple(map(str, entry["sha256"])))
        for name, entry in data["files"].items()
    }
    calibration = data.get("calibration")
    signature = data.get("signature")
    if signature is not None and not (signature.isascii() and len(signature) <= SIGNATURE):
        raise ValueError("a signature that is none")
    return data | {
        "spec": ModelSpec.from_dict(data["spec"]),
        "recipe": recipe,
        "graphs": graphs,
        "files": files,
        "positions_limit": None if limit is None else int(limit),
        "parameters": int(data["parameters"]),
        "calibration": None if calibration is None else CalibrationText.from_dict(calibration),
        "versions": dict(data["versions"]),
        "engines": dict(data["engines"]),
        "warnings": tuple(map(str, data["warnings"])),
        "reports": tuple(map(str, data["reports"])),
    }


def _graph_record(entry: dict[str, Any]) -> GraphRecord:
    record = GraphRecord(**{**entry, "file": str(entry["file"]), "providers": tuple(map(str, entry["providers"]))})
    _ = record.oldest  # ValueError: no version
    return record


def fingerprint_of(tensors: str, spec: ModelSpec, decay: str) -> str:
    """Names a checkpoint as states see it.

    Args:
        tensors: hash over names, shapes and data of all tensors.
        decay: how D1 and D2 were read: exact, analytic or repaired.
    """
    facts = {name: value for name, value in spec.to_dict().items() if name not in NOT_OF_STATES}
    text = json.dumps([tensors, facts, decay], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
