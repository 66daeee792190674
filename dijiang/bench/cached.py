"""Running the Transformer that transformer.py wrote: keys and values in place, greedy steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle import names
from ..errors import InputError, SessionError
from ..recipe import AUTO
from ..runtime.operators import has_library
from ..runtime.sessions.base import PIECE
from ..runtime.sessions.inference import import_onnxruntime, open_inference
from ..runtime.sessions.providers import emulates
from .subject import Subject

FILE = "model.onnx"
#: Key of the file's metadata: tokens that a sequence can have.
POSITIONS = "positions"
#: onnxruntime's name of a cache's type -> NumPy's.
ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
#: Distinct values that a cache is filled with; more would only take longer to draw.
DRAWN = 1 << 18


@dataclass
class Cache:
    """Keys and values: two [B, G, capacity, K] arrays a layer, written in place. position: tokens."""

    layers: list[tuple[np.ndarray, np.ndarray]]
    position: int


class CachedSubject(Subject):
    """A Transformer with an in-place key-value cache, in a folder.

    A depth is reached by random keys and values: the time of a step does not depend on them, and the
    prompt of a deep test would take many times longer than the test.
    """

    def __init__(self, path: str | Path, threads: int | None, provider: str) -> None:
        if provider != AUTO and not emulates(provider):
            raise SessionError(f"no baseline for provider {provider!r}, expected cpu; use --provider cpu")
        self._session = open_inference(Path(path) / FILE, operators=has_library(), threads=threads)
        self.provider = str(self._session.get_providers()[0])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self.vocab_size = self._session.get_outputs()[0].shape[-1]
        self._positions = int(self._session.get_modelmeta().custom_metadata_map[POSITIONS])
        self._step: _Step | None = None

    def at(self, batch: int, depth: int, end: int) -> Cache:
        if end > self._positions:
            raise InputError(f"{end} positions, this Transformer has embeddings for {self._positions}; lower -d")
        first = self._inputs[names.past_cache(0)[0]]
        shape, kind = (batch, first.shape[1], end, first.shape[3]), ELEMENTS[first.type]
        random = np.random.default_rng(0).standard_normal(DRAWN)
        drawn = (random * 20 if kind is np.int8 else random).astype(kind)
        layers = sum(names.past_cache(layer)[0] in self._inputs for layer in range(len(self._inputs)))
        return Cache([(np.resize(drawn, shape), np.resize(drawn, shape)) for _ in range(layers)], depth)

    def rewind(self, state: Cache, depth: int) -> None:
        state.position = depth

    def prefill(self, ids: np.ndarray, state: Cache) -> np.ndarray:
        return self.forward(ids, state).argmax(axis=-1)

    def steps(self, tokens: np.ndarray, state: Cache) -> Iterator[np.ndarray]:
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
        if step is None or step.state is not state or step.ids.shape != shape:
            step = _Step(self, shape, state)
            if shape[1] == 1:
                self._step = step
        return step


class _Step:
    """Buffers of one shape bound to one cache: made once, run many times."""

    def __init__(self, subject: CachedSubject, shape: tuple[int, ...], state: Cache) -> None:
        batch, length = shape
        self.state, self._session = state, subject._session
        self.ids, self._positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self._last, self._total = np.zeros(batch, np.int32), np.zeros((), np.int32)
        self._logits = np.empty((batch, 1, subject.vocab_size), np.float32)
        self.tokens = np.empty((batch, 1), np.int64)
        inputs: dict[str, np.ndarray] = {
            names.INPUT_IDS: self.ids,
            names.POSITION_IDS: self._positions,
            names.LOGIT_INDICES: np.full((batch, 1), length - 1),
            names.LAST_POSITION: self._last,
            names.TOTAL_LENGTH: self._total,
        }
        outputs: dict[str, np.ndarray] = {names.LOGITS: self._logits, names.NEXT_TOKENS: self.tokens}
        for layer, pair in enumerate(state.layers):
            inputs |= zip(names.past_cache(layer), pair, strict=True)
            outputs |= zip(names.present_cache(layer), pair, strict=True)
        self._io, value = self._session.io_binding(), import_onnxruntime().OrtValue.ortvalue_from_numpy
        #: By address: an array and what shares its memory; both must live as long as the binding.
        self._values = {id(a): (a, value(a)) for a in (*inputs.values(), self._logits, self.tokens)}
        for name, array in inputs.items():
            if name in subject._inputs:
                self._io.bind_ortvalue_input(name, self._values[id(array)][1])
        for name, array in outputs.items():
            self._io.bind_ortvalue_output(name, self._values[id(array)][1])

    def run(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, vocab] of the last token; advances the cache."""
        state, length = self.state, self.ids.shape[1]
        self.ids[...] = ids
        self._positions[...] = state.position + np.arange(length)
        state.position += length
        self._last[...] = state.position - 1
        self._total[...] = state.position
        self._session.run_with_iobinding(self._io)
        return self._logits[:, 0]
