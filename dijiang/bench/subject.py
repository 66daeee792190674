"""What can be timed: a DiJiang bundle, or (in vanilla.py) a Transformer of the same shape."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from ..runtime.model import Model
from ..runtime.state import State
from .traffic import Traffic

#: Tokens of prompt that give a state realistic contents before it is moved to a depth.
FILL = 64


class Subject(Protocol):
    """One loaded model. ids [B, T] int64; logits [B, vocab] float32 of each sequence's last token."""

    vocab_size: int
    provider: str  #: what really runs it, as ONNX Runtime names it

    def at(self, batch: int, depth: int, end: int) -> Any:
        """The state of `batch` sequences that have `depth` tokens and will have up to `end`."""
        ...

    def rewind(self, state: Any, depth: int) -> None:
        """Move a state back to a depth, for the next repetition."""
        ...

    def forward(self, ids: np.ndarray, state: Any) -> np.ndarray:
        """Advance the state over ids."""
        ...


class DijiangSubject:
    """A DiJiang model.

    A depth is reached by a short real prompt and then by moving the position: the time of a step
    depends on neither the state's values nor the position, and prefilling 32,768 tokens for each
    test would take longer than the test.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.vocab_size = model.spec.vocab_size
        self.provider = str(getattr(model._session, "provider", type(model._session).__name__))

    def at(self, batch: int, depth: int, end: int) -> State:
        """See Subject.at; InputError past a tabled model's last position."""
        limit = self.model.manifest.positions_limit
        if limit is not None and end > limit:
            raise InputError(
                f"{end} positions, this bundle has {limit}: {self.model.manifest.limit_reason}; "
                "lower -d, or export with --decay analytic"
            )
        state = self.model.new_state(batch)
        if depth:
            ids = np.random.default_rng(0).integers(self.vocab_size, size=(batch, min(depth, FILL)))
            self.model.forward(ids, state)
        self.rewind(state, depth)
        return state

    def rewind(self, state: State, depth: int) -> None:
        """See Subject.rewind."""
        state.position[:] = depth

    def forward(self, ids: np.ndarray, state: State) -> np.ndarray:
        """See Subject.forward."""
        return self.model.forward(ids, state)


def bundle_traffic(reads: dict[str, int] | None, state_bytes: int) -> Traffic:
    """Bytes of a step from what the exporter noted; InputError for a bundle without the note."""
    if not reads:
        raise InputError("the bundle does not say how many bytes a step reads; export it again")
    return Traffic(reads["step"], reads["token"], state_bytes)
