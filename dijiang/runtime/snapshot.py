"""A state in a file: safetensors, whole or not at all, and checked before it is believed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, VersionError, reason
from ..files import write_file
from ..reading import read_regular

FORMAT, VERSION = "dijiang-state", "3"
#: Largest file that is read: sixteen times the state of LLaMA2-7B for 64 sequences.
LARGEST = 1 << 36
#: Name -> dtype and rank; layers are named layer.0, layer.1, ...
FIXED = {"position": ("int64", 1), "last": ("int64", 2), "seen": ("uint8", 2), "history": ("uint8", 2)}
#: Bytes of a history: SHA-256. The history of no tokens is zeros.
HASH = 32


#: Last token ids that a state keeps of each sequence: what decides how the next one reads as text.
LAST = 64
#: How often a token stands in an answer.
COUNT = np.uint32
#: In `last`: no token yet. In a step's tokens: the step has not ended.
NONE = -1


@dataclass(frozen=True)
class Seam:
    """What a sequence needs to go on where it stopped.

    token: the last one, generated but not fed.  at: the position where it belongs; past it, it was fed.
    open: last tokens, this one included, of a character that is not whole yet.
    held: text that may be the start of a stop string, not given out yet.
    counts: how often each token stands in the answer, where its options ask for it: COUNT [vocab].
    """

    token: int
    at: int
    open: int = 0
    held: str = ""
    counts: bytes = b""

    def plain(self) -> dict[str, Any]:
        """Its fields as JSON has them: counts are pairs of a token id and how often it stands there."""
        counts = np.frombuffer(self.counts, COUNT)
        tokens = np.flatnonzero(counts)
        return vars(self) | {"counts": np.stack([tokens, counts[tokens]], axis=1).tolist()}

    @classmethod
    def read(cls, found: Any, vocab: int) -> Seam:
        """The values of what `plain` gave; ValueError or TypeError for anything that no state has."""
        token, at, open_, held, pairs = found
        told = [(one, count) for one, count in pairs]
        if not all(type(n) is int for n in (token, at, open_, *chain(*told))) or not isinstance(held, str):
            raise ValueError("a seam of the wrong types")
        if not all(0 <= one < vocab for one in (token, *dict(told))) or at < 0 or not 0 <= open_ <= LAST:
            raise ValueError("a seam out of range")
        if not all(1 <= count <= np.iinfo(COUNT).max for _, count in told):
            raise ValueError("a seam with counts out of range")
        counts = np.zeros(vocab if told else 0, COUNT)
        for one, count in told:
            counts[one] = count
        return cls(token, at, open_, held, counts.tobytes())


@dataclass(frozen=True)
class Note:
    """What a snapshot tells beside the state; empty where nobody wrote it.

    made: `dijiang`, `precision`, `graph` and `provider` that made the state.
    sampler: how its tokens were drawn: the fields of `options.Generation` but max_tokens and ALONE.
    top: the most likely tokens after the pending one, and their logits; see `witness`.
    """

    made: dict[str, str] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def read(cls, text: str) -> Note:
        """From its JSON; ValueError for anything else."""
        found = json.loads(text)
        made, sampler, top = found["made"], found["sampler"], found["top"]
        texts = isinstance(made, dict) and all(isinstance(value, str) for value in made.values())
        if not texts or not isinstance(sampler, dict) or not all(map(_is_flat, sampler.values())):
            raise ValueError("a note of the wrong types")
        return cls(made, sampler, tuple((int(token), float(logit)) for token, logit in top))


def _is_flat(value: Any) -> bool:
    """Whether it is a plain value, or a list of such."""
    plain = (str, int, float, bool, type(None))
    return isinstance(value, plain) or (isinstance(value, list) and all(isinstance(one, plain) for one in value))


NO_NOTE = Note()


@dataclass(frozen=True)
class Snapshot:
    """All of a state, as a file holds it; see `state.State` and `state.Point`.

    seen: [B, vocab] bool.  history: [B, HASH] uint8, a hash over the tokens fed, see `chained`.
    vocabulary: of the tokenizer that its ids are of, see `text.TextTokenizer`; empty: not known.
    """

    layers: list[np.ndarray]
    position: np.ndarray
    last: np.ndarray
    seen: np.ndarray
    history: np.ndarray
    seams: list[Seam | None]
    fingerprint: str
    vocab_size: int
    note: Note = NO_NOTE
    vocabulary: str = ""

    def save(self, path: Path) -> None:
        """Write to exactly this path; InputError if it cannot be written, or holds what no state has."""
        write_file(path, self.dump(), InputError)

    def dump(self) -> bytes:
        """The file's bytes; InputError if a layer holds NaN or infinity: `load` would refuse it."""
        from safetensors.numpy import save

        if (index := _lost(self.layers)) is not None:
            raise InputError(
                f"layer {index} of the state holds NaN or infinity, so it is not saved; take one of before"
            )
        tensors = {f"layer.{i}": layer for i, layer in enumerate(self.layers)}
        tensors |= {
            "position": self.position,
            "last": np.ascontiguousarray(self.last),
            "seen": np.packbits(self.seen, axis=1),
            "history": self.history,
        }
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "vocab_size": str(self.vocab_size),
            "seams": json.dumps([None if s is None else list(s.plain().values()) for s in self.seams]),
            "note": json.dumps(asdict(self.note)),
        }
        metadata |= {"vocabulary": self.vocabulary} if self.vocabulary else {}
        return save(tensors, metadata | {"digest": _digest(metadata, tensors)})

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            InputError: not such a file, of another version, damaged, or with numbers that no state has.
        """
        try:
            data = read_regular(path, LARGEST)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a saved state ({reason(error)}); save it again") from error
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Snapshot:
        """Read what `dump` gave; InputError, which begins with `where`, as `load`."""
        metadata, tensors = _read(data, where)
        try:
            vocab = int(metadata["vocab_size"])
            layers = _checked(tensors, vocab)
            made = cls(
                layers,
                tensors["position"],
                tensors["last"],
                np.unpackbits(tensors["seen"], axis=1, count=vocab).astype(bool),
                tensors["history"],
                _seams(json.loads(metadata["seams"]), len(tensors["position"]), vocab),
                metadata["fingerprint"],
                vocab,
                Note.read(metadata["note"]),
                metadata.get("vocabulary", ""),
            )
            if _digest(metadata, tensors) != metadata["digest"]:
                raise ValueError("its contents are not what its digest says")
            return made
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"{where}: not a saved state ({reason(error)}); save it again") from error


def chained(history: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The history [HASH] after tokens [T] int64: for each, SHA-256 of the history before it and its 8 bytes.

    So it is a function of the tokens alone, however they were split.
    """
    digest, data = history.tobytes(), ids.astype("<i8").tobytes()
    for start in range(0, len(data), 8):
        digest = hashlib.sha256(digest + data[start : start + 8]).digest()
    return np.frombuffer(digest, np.uint8)


def _digest(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over all that a file says but the digest."""
    told = sorted((name, value) for name, value in metadata.items() if name != "digest")
    shapes = sorted((name, str(tensor.dtype), tensor.shape) for name, tensor in tensors.items())
    found = hashlib.sha256(json.dumps([told, shapes]).encode())
    for name, _, _ in shapes:
        found.update(np.ascontiguousarray(tensors[name]).data)
    return found.hexdigest()


def _read(data: bytes, where: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if data[:2] == b"PK":
        raise InputError(f"{where}: a state of dijiang 0.1, which has no name of its model; save it again")
    try:
        tensors = load(data)  # checks the header, too
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = dict(header.get("__metadata__") or {})
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: not a saved state ({reason(error)}); save it again") from error
    kind, version = metadata.get("format", "no state"), metadata.get("version", "unknown")
    if kind != FORMAT:
        raise InputError(f"{where}: {kind}, expected {FORMAT} version {VERSION}; save it again with this dijiang")
    if version != VERSION:
        raise VersionError(
            f"{where}: {kind} version {version}, expected {FORMAT} version {VERSION}; feed its text again, or "
            "use the dijiang that wrote it"
        )
    return metadata, tensors


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
    if (lost := _lost(layers)) is not None:
        raise ValueError(f"layer {lost} holds NaN or infinity")
    last, seen = tensors["last"], tensors["seen"]
    if (position < 0).any() or last.shape != (batch, LAST) or seen.shape != (batch, (vocab + 7) // 8):
        raise ValueError("positions, last ids or seen ids out of range")
    if tensors["history"].shape != (batch, HASH):
        raise ValueError("a history of another size")
    if ((last < NONE) | (last >= vocab)).any():
        raise ValueError("a last id outside of the vocabulary")
    return layers


def _lost(layers: list[np.ndarray]) -> int | None:
    """The first layer that holds NaN or infinity."""
    return next((index for index, layer in enumerate(layers) if not np.isfinite(layer).all()), None)


def _seams(found: Any, batch: int, vocab: int) -> list[Seam | None]:
    if not isinstance(found, list) or len(found) != batch:
        raise ValueError("seams of another number of sequences")
    return [None if entry is None else Seam.read(entry, vocab) for entry in found]
