"""Prefill and decoding of a bundle as users run them: what the bench times."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..runtime.model import Model
from ..runtime.state import State


def prefill(model: Model, ids: np.ndarray, state: State) -> np.ndarray:
    """Advance the state over ids [B, T]; the most likely next tokens [B]."""
    if len(ids) == 1:
        return np.array([model.next_token(ids, state)])
    tokens: np.ndarray = model.forward(ids, state).argmax(axis=-1)
    return tokens


def decode(model: Model, tokens: np.ndarray, state: State) -> Iterator[np.ndarray]:
    """Greedy steps: feeds tokens [B] and yields the next ones [B], for ever; bound before the first."""
    return _one(model, int(tokens[0]), state) if len(tokens) == 1 else _batch(model, tokens, state)


def _one(model: Model, token: int, state: State) -> Iterator[np.ndarray]:
    pick, tokens = model.decoder(state).pick, np.empty(1, np.int64)

    def steps() -> Iterator[np.ndarray]:
        chosen = token
        while True:
            tokens[0] = chosen = pick(chosen)
            yield tokens

    return steps()


def _batch(model: Model, tokens: np.ndarray, state: State) -> Iterator[np.ndarray]:
    while True:
        tokens = model.forward(tokens[:, None], state).argmax(axis=-1)
        yield tokens
