"""Running the Transformer that transformer.py wrote: keys and values in place, greedy steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import names
from ..errors import InputError, SessionError
from ..recipe import AUTO
from ..runtime.sessions.base import PIECE
from ..runtime.sessions.inference import import_onnxruntime, open_inference
from ..runtime.sessions.providers import emulates

FILE, FACTS = "model.onnx", "transformer.json"
CACHE_TYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
#: Distinct values that a cache is filled with; more would only take longer to draw.
DRAWN = 1 << 18


@dataclass(frozen=True)
class CachedFacts:
    """What the folder's transformer.json says; positions: tokens that a sequence can have."""

    vocab_size: int
    layers: int
    kv_heads: int
    head_size: int
    positions: int
    cache: str

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        width = 2 * self.layers * self.kv_heads * self.head_size
        return width * np.dtype(CACHE_TYPES[self.cache]).itemsize


@dataclass
class Cache:
    """Keys and values: two [B, G, capacity, K] arrays a layer, written in place. position: tokens."""

    layers: list[tuple[np.ndarray, np.ndarray]]
    position: int


class CachedSubject:
    """A Transformer with an in-place key-value cache; see subject.Subject.

    A depth is reached by random keys and values: the time of a step does not depend on them, and the
    prompt of a deep test would take many times longer than the test.
    """

    def __init__(self, folder: Path, *, threads: int | None, provider: str) -> None:
        if provider != AUTO and not emulates(provider):
            raise SessionError(f"no baseline for provider {provider!r}, expected cpu; use --provider cpu")
        self._about = CachedFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        self.vocab_size = self._about.vocab_size
        self._ort = import_onnxruntime()
        self._session = open_inference(folder / FILE, threads=threads)
        self.provider = str(self._session.get_providers()[0])
        self._step: _Step | None = None

    def at(self, batch: int, depth: int, end: int) -> Cache:
        """See Subject.at."""
        facts = self._about
        if end > facts.positions:
            raise InputError(f"{end} positions, this Transformer has embeddings for {facts.positions}; lower -d")
        shape = (batch, facts.kv_heads, end, facts.head_size)
        random = np.random.default_rng(0).standard_normal(DRAWN)
        kind = CACHE_TYPES[facts.cache]
        drawn = (random * 20).astype(kind) if kind is np.int8 else random.astype(kind)

        def fill() -> np.ndarray:
            return np.resize(drawn, shape)

        return Cache([(fill(), fill()) for _ in range(facts.layers)], depth)

    def rewind(self, state: Cache, depth: int) -> None:
        """See Subject.rewind."""
        state.position = depth

    def prefill(self, ids: np.ndarray, state: Cache) -> np.ndarray:
        """See Subject.prefill."""
        tokens: np.ndarray = self.forward(ids, state).argmax(axis=-1)
        return tokens

    def steps(self, tokens: np.ndarray, state: Cache) -> Iterator[np.ndarray]:
        """See Subject.steps."""
        step = self._bind(tokens[:, None].shape, state)

        def loop(tokens: np.ndarray) -> Iterator[np.ndarray]:
            while True:
                step.run(tokens[:, None])
                tokens = step.tokens[:, 0]
                yield tokens

        return loop(tokens)

    def forward(self, ids: np.ndarray, state: Cache) -> np.ndarray:
        """Logits [B, vocab] of the last tokens; a prompt goes through in pieces, as a bundle's does.

        The node takes a piece after earlier tokens only of one sequence: then they go one by one.
        """
        batch, length = ids.shape
        if batch == 1 or length == 1 or (state.position == 0 and length <= PIECE):
            for start in range(0, length, PIECE):
                piece = ids[:, start : start + PIECE]
                logits = self._bind(piece.shape, state).run(piece)
            return logits
        rows = []
        for i in range(batch):
            own = Cache([(k[i : i + 1], v[i : i + 1]) for k, v in state.layers], state.position)
            rows.append(self.forward(ids[i : i + 1], own)[0].copy())
        state.position += length
        return np.stack(rows)

    def _bind(self, shape: tuple[int, ...], state: Cache) -> _Step:
        """Buffers for calls of a shape [B, T]; those of the last decode step stay."""
        step = self._step
        if step is None or not step.fits(shape, state):
            step = _Step(self._ort, self._session, shape, state, self._about)
            if shape[1] == 1:
                self._step = step
        return step


class _Step:
    """Buffers of one shape bound to one cache: made once, run many times."""

    def __init__(self, ort: Any, session: Any, shape: tuple[int, ...], state: Cache, facts: CachedFacts) -> None:
        self._session, self._shape, self._state = session, shape, state
        batch, length = shape
        self._ids = np.zeros(shape, np.int64)
        self._last = np.zeros(batch, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits = np.empty((batch, 1, facts.vocab_size), np.float32)
        self.tokens = np.empty((batch, 1), np.int64)
        inputs = {
            names.INPUT_IDS: self._ids,
            names.LOGIT_INDICES: np.full((batch, 1), length - 1),
            names.LAST_POSITION: self._last,
            names.TOTAL_LENGTH: self._total,
        }
        self._positions = np.zeros(shape, np.int64)
        if names.POSITION_IDS in (value.name for value in session.get_inputs()):
            inputs[names.POSITION_IDS] = self._positions
        self._io = session.io_binding()
        #: They share the arrays' memory and must live as long as the binding.
        self._values: list[tuple[np.ndarray, Any]] = []
        for name, array in inputs.items():
            self._io.bind_ortvalue_input(name, self._value(ort, array))
        self._io.bind_ortvalue_output(names.LOGITS, self._value(ort, self._logits))
        self._io.bind_ortvalue_output(names.NEXT_TOKENS, self._value(ort, self.tokens))
        for layer, pair in enumerate(state.layers):
            ends = zip(pair, names.past_cache(layer), names.present_cache(layer), strict=True)
            for array, past, present in ends:
                value = self._value(ort, array)
                self._io.bind_ortvalue_input(past, value)
                self._io.bind_ortvalue_output(present, value)

    def _value(self, ort: Any, array: np.ndarray) -> Any:
        self._values.append((array, ort.OrtValue.ortvalue_from_numpy(array)))
        return self._values[-1][1]

    def fits(self, shape: tuple[int, ...], state: Cache) -> bool:
        """Whether this binding serves a call."""
        return self._state is state and self._shape == shape

    def run(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, vocab] of the last token; advances the cache."""
        state, length = self._state, self._shape[1]
        self._ids[...] = ids
        self._positions[...] = state.position + np.arange(length)
        state.position += length
        self._last[...] = state.position - 1
        self._total[...] = state.position
        self._session.run_with_iobinding(self._io)
        return self._logits[:, 0]


def load_cached(path: str, threads: int | None, provider: str) -> CachedSubject:
    """The baseline in a folder, in the process that measures it."""
    return CachedSubject(Path(path), threads=threads, provider=provider)
