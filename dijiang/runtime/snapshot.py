"""A state in a file: safetensors, whole or not at all, and checked before it is believed."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import write_file

FORMAT, VERSION = "dijiang-state", "1"
#: Largest file that is read: sixteen times the state of LLaMA2-7B for 64 sequences.
LARGEST = 1 << 36
#: Name -> dtype and rank; layers are named layer.0, layer.1, ...
FIXED = {"position": ("int64", 1), "last": ("int64", 2), "seen": ("uint8", 2)}


#: Last token ids that a state keeps of each sequence: what decides how the next one reads as text.
LAST = 64
#: In `last`: no token yet. In a step's tokens: the step has not ended.
NONE = -1


@dataclass(frozen=True)
class Seam:
    """What a sequence needs to go on where it stopped.

    token: the last one, generated but not fed.  at: the position where it belongs; past it, it was fed.
    open: last tokens, this one included, of a character that is not whole yet.
    held: text that may be the start of a stop string, not given out yet.
    """

    token: int
    at: int
    open: int = 0
    held: str = ""


@dataclass(frozen=True)
class Snapshot:
    """All of a state, as a file holds it; see `state.State` and `state.Point`.

    seen: [B, vocab] bool.
    """

    layers: list[np.ndarray]
    position: np.ndarray
    last: np.ndarray
    seen: np.ndarray
    seams: list[Seam | None]
    fingerprint: str
    vocab_size: int

    def save(self, path: Path) -> None:
        """Write to exactly this path; InputError if it cannot be written."""
        from safetensors.numpy import save

        tensors = {f"layer.{i}": layer for i, layer in enumerate(self.layers)}
        tensors |= {
            "position": self.position,
            "last": np.ascontiguousarray(self.last),
            "seen": np.packbits(self.seen, axis=1),
        }
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "vocab_size": str(self.vocab_size),
            "seams": json.dumps([None if s is None else list(vars(s).values()) for s in self.seams]),
        }
        write_file(path, save(tensors, metadata), InputError)

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            InputError: not such a file, of another version, damaged, or with numbers that no state has.
        """
        metadata, tensors = _read(path)
        try:
            vocab = int(metadata["vocab_size"])
            layers = _checked(tensors, vocab)
            return cls(
                layers,
                tensors["position"],
                tensors["last"],
                np.unpackbits(tensors["seen"], axis=1, count=vocab).astype(bool),
                _seams(json.loads(metadata["seams"]), len(tensors["position"]), vocab),
                metadata["fingerprint"],
                vocab,
            )
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: not a saved state ({error}); save it again") from error


def _read(file: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise InputError(f"{file}: not a regular file of at most {LARGEST >> 30} GiB; save it again")
        with file.open("rb") as stream:
            if stream.read(2) == b"PK":
                raise InputError(f"{file}: a state of dijiang 0.1, which has no name of its model; save it again")
        with safe_open(str(file), framework="np") as opened:
            metadata = dict(opened.metadata() or {})
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise InputError(
                    f"{file}: {metadata.get('format', 'no state')} version "
                    f"{metadata.get('version', 'unknown')}, expected {FORMAT} version {VERSION}; save it "
                    "again with this dijiang, or upgrade dijiang"
                )
            names = opened.keys()
            return metadata, {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not a saved state ({error}); save it again") from error


def _checked(tensors: dict[str, np.ndarray], vocab: int) -> list[np.ndarray]:
    """The layers; ValueError for anything that no state has."""
    for name, (dtype, rank) in FIXED.items():
        if tensors[name].dtype != dtype or tensors[name].ndim != rank:
            raise ValueError(f"{name} is {tensors[name].dtype} of rank {tensors[name].ndim}")
    layers = [tensors[f"layer.{i}"] for i in range(len(tensors) - len(FIXED))]
    position, batch = tensors["position"], len(tensors["position"])
    if not layers or not batch or vocab < 1:
        raise ValueError("no layers or no sequences")
    shape = layers[0].shape
    for index, layer in enumerate(layers):
        if layer.dtype != np.float32 or layer.shape != shape or len(shape) != 4 or shape[0] != batch:
            raise ValueError(f"layer {index} is {layer.dtype} {list(layer.shape)}")
        if not np.isfinite(layer).all():
            raise ValueError(f"layer {index} holds NaN or infinity")
    last, seen = tensors["last"], tensors["seen"]
    if (position < 0).any() or last.shape != (batch, LAST) or seen.shape != (batch, (vocab + 7) // 8):
        raise ValueError("positions, last ids or seen ids out of range")
    if ((last < NONE) | (last >= vocab)).any():
        raise ValueError("a last id outside of the vocabulary")
    return layers


def _seams(found: Any, batch: int, vocab: int) -> list[Seam | None]:
    if not isinstance(found, list) or len(found) != batch:
        raise ValueError("seams of another number of sequences")
    seams: list[Seam | None] = []
    for entry in found:
        if entry is None:
            seams.append(None)
            continue
        token, at, open_, held = entry
        if not all(type(n) is int for n in (token, at, open_)) or not isinstance(held, str):
            raise ValueError("a seam of the wrong types")
        if not 0 <= token < vocab or at < 0 or not 0 <= open_ <= LAST:
            raise ValueError("a seam out of range")
        seams.append(Seam(token, at, open_, held))
    return seams
