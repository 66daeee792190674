"""What can be timed: a DijiangSubject, a Transformer of its shape (cached.py), or a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..bundle.opened import Bundle
from ..errors import InputError
from ..runtime.generate import decode, greedy, prefill
from ..runtime.model import Model, load
from ..runtime.state import State
from .matrix import Test
from .traffic import Traffic

#: Tokens of prompt that give a state realistic contents before it is moved to a depth.
FILL = 64
#: Decode steps, one a token: tokens [B] in, the next tokens [B] out, for ever.
Steps = Callable[[np.ndarray, Any], Iterator[np.ndarray]]


class Subject(Protocol):
    """One loaded model. ids [B, T] int64; tokens [B] int64, the most likely ones after what was fed."""

    vocab_size: int
    provider: str  #: what really runs it, as ONNX Runtime names it

    def at(self, batch: int, depth: int, end: int) -> Any:
        """The state of `batch` sequences that have `depth` tokens and will have up to `end`."""
        ...

    def rewind(self, state: Any, depth: int) -> None:
        """Move a state back to a depth, for the next repetition."""
        ...

    def prefill(self, ids: np.ndarray, state: Any) -> np.ndarray:
        """Advance the state over a prompt; the next tokens."""
        ...

    def steps(self, tokens: np.ndarray, state: Any) -> Iterator[np.ndarray]:
        """The decode loop that users run; one next() is one step.

        What it prepares is prepared when this returns, not in the first step.
        """
        ...


@runtime_checkable
class SelfTimed(Protocol):
    """A subject with a clock of its own: another program, or steps that overlap on a GPU."""

    provider: str

    def warm_up(self, test: Test) -> None:
        """Once, before anything counts."""
        ...

    def seconds(self, test: Test) -> list[float]:
        """One repetition: of each token, or one total."""
        ...

    def peaks(self) -> dict[str, int | None]:
        """Peak bytes: `host`, `device`; None: unknown."""
        ...


#: load(path, threads, provider) -> subject; importable by name, as it crosses processes.
Load = Callable[[str, "int | None", str], "Subject | SelfTimed"]


@dataclass(frozen=True)
class Side:
    """What is measured: its name, what loads it, what a step moves, and what the report says about it.

    baseline_of: the side that this one is the Transformer of.
    """

    name: str
    path: str
    load: Load
    traffic: Traffic
    facts: dict[str, Any]
    baseline_of: str | None = None


class DijiangSubject:
    """A DiJiang model.

    A depth is reached by a short real prompt and then by moving the position: the time of a step
    depends on neither the state's values nor the position, and prefilling 32,768 tokens for each
    test would take longer than the test.

    ways: other loops that decode, by the name that Test.way has.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.vocab_size = model.spec.vocab_size
        self.provider, session = model.provider, model.session
        self.facts = {
            "graph": model.graph,
            "longest_piece": session.longest,
            "captured": getattr(session, "cuda_graph", None),
        }
        self.ways: dict[str, Steps] = {}

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

    def prefill(self, ids: np.ndarray, state: State) -> np.ndarray:
        """See Subject.prefill."""
        tokens: np.ndarray = prefill(self.model, ids, state).tokens[:, 0]
        return tokens

    def steps(self, tokens: np.ndarray, state: State) -> Iterator[np.ndarray]:
        """See Subject.steps."""
        records = decode(self.model, Given(tokens[:, None]), state, greedy(self.model, len(tokens)))
        next(records)  # of the tokens that were given
        return (np.array([record.token for record in step]) for step in records)


@dataclass(frozen=True)
class Given:
    """Tokens in the place of an output: what the loop feeds first."""

    tokens: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """There are none."""
        raise NotImplementedError


def load_bundle(path: str, threads: int | None, provider: str) -> DijiangSubject:
    """A bundle, in the process that measures it."""
    return DijiangSubject(load(path, provider=provider, threads=threads, check_hashes=False))


def bundle_side(name: str, bundle: Bundle, loads: Load = load_bundle) -> Side:
    """A bundle as a side of a bench."""
    manifest = bundle.manifest
    facts = {
        "kind": "dijiang",
        "precision": manifest.recipe.precision,
        "graph": ", ".join(manifest.graphs),
        "bytes": bundle.nbytes,
        "spec": manifest.spec.to_dict(),
    }
    traffic = bundle_traffic(next(iter(manifest.graphs.values())).reads, manifest.spec.state_bytes)
    return Side(name, str(bundle.path), loads, traffic, facts)


def bundle_traffic(reads: dict[str, int] | None, state_bytes: int) -> Traffic:
    """Bytes of a step from what the exporter noted; InputError for a bundle without the note."""
    if not reads:
        raise InputError("the bundle does not say how many bytes a step reads; export it again")
    return Traffic(reads["step"], reads["token"], state_bytes)
