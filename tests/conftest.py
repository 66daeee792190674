"""Golden data: checkpoints with logits of the published modelling code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"

GOLDEN = {path.name: path for path in [*sorted((TESTS / "golden").iterdir()), EXAMPLES / "tiny-python"]}


@dataclass(frozen=True)
class Golden:
    """A golden case: ids [B, T], the positions whose logits [B, P, V] are known."""

    path: Path
    ids: np.ndarray
    positions: np.ndarray
    logits: np.ndarray

    @classmethod
    def load(cls, name: str) -> Golden:
        path = GOLDEN[name]
        with np.load(path / "golden.npz") as data:
            ids = data["input_ids"]
            positions = data["positions"] if "positions" in data else np.arange(ids.shape[1])
            return cls(path, ids, positions, data["logits"])

    def error(self, logits: np.ndarray) -> float:
        """Largest difference of all-position logits [B, T, V] from the golden ones."""
        return float(np.abs(logits[:, self.positions] - self.logits).max())
