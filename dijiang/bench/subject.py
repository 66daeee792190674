"""What can be timed: DiJiang models with the loop that users run; cached.py and benchmarks/ have the peers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..bundle.opened import Bundle
from ..errors import InputError, SessionError
from ..machine.sensors import answered, handles, load_nvml
from ..runtime.generate import decode, greedy, prefill
from ..runtime.model import Model, load
from ..runtime.sessions.base import Session
from ..runtime.sessions.copies import device_bandwidth
from ..runtime.sessions.device_session import DeviceSession
from ..runtime.state import State
from .matrix import Test

#: Tokens of prompt that give a state realistic contents before it is moved to a depth.
FILL = 64
#: Decode steps of a warm-up.
WARM_STEPS = 8
#: Decode steps, one a token: tokens [B] in, the next tokens [B] out, for ever.
Steps = Callable[[np.ndarray, Any], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Traffic:
    """Bytes that a decode step reads and writes: the numerator of the roofline.

    weights: bytes of parameters that every step reads once, whatever the batch.
    rows: bytes of looked-up table rows a token (embedding, rotary, decay tables).
    state: bytes of recurrent state a sequence; read and written.
    cache: bytes of keys and values a token of a sequence; read for every earlier token, written once.
    """

    weights: int
    rows: int = 0
    state: int = 0
    cache: int = 0

    def step(self, batch: int, depth: float) -> float:
        """Bytes of one decode step of `batch` sequences that have `depth` tokens each."""
        return self.weights + batch * (self.rows + 2 * self.state + (depth + 1) * self.cache)

    def resident(self, batch: int, tokens: int) -> int:
        """Bytes of the states or caches of `batch` sequences that will have `tokens` tokens."""
        return batch * (self.state + tokens * self.cache)


class Subject:
    """One loaded model and the clock of its loops, which is read once a token.

    A subject has `vocab_size` and, with ids [B, T] and tokens [B] int64 (the most likely ones after what
    was fed), the four methods below. One with a clock of its own (another program, steps that overlap on
    a GPU) replaces `prepare`, `warm_up`, `seconds` and `peaks` instead.

    provider: what really runs it, as ONNX Runtime names it.  facts: for the report.
    ways: other loops that decode, by the name that Test.way has.
    """

    vocab_size: int
    provider: str
    facts: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    ways: dict[str, Steps] = {}  # noqa: RUF012
    #: at(batch, depth, end): the state of sequences that have `depth` tokens and will have up to `end`.
    at: Callable[[int, int, int], Any]
    #: Move a state back to a depth, for the next repetition.
    rewind: Callable[[Any, int], None]
    #: Advance the state over a prompt; the next tokens.
    prefill: Callable[[np.ndarray, Any], np.ndarray]
    #: The decode loop that users run; what it prepares is prepared when this returns.
    steps: Steps

    def prepare(self, tests: Sequence[Test]) -> None:
        """Make the state that tests share which differ only in depth or way."""
        deepest = max(tests, key=lambda test: test.end)
        self.state = self.at(deepest.batch, deepest.depth, deepest.end)

    def warm_up(self, test: Test) -> None:
        """Once over the same path; not part of any figure."""
        self._run(test, min(test.tokens, WARM_STEPS))

    def seconds(self, test: Test) -> list[float]:
        """One repetition: seconds of the prompt (pp), of each token (tg), or one total."""
        return self._run(test, test.tokens)

    def peaks(self) -> dict[str, int | None]:
        """Peak bytes: `host` (resident set), `device` (GPU memory of this process); None: unknown."""
        return {"host": _peak_host_bytes(), "device": _device_bytes()}

    def ids(self, test: Test) -> np.ndarray:
        """What is fed: a prompt [B, tokens], or the first token [B, 1]."""
        shape = (test.batch, test.tokens if test.prompt else 1)
        return np.random.default_rng(test.tokens).integers(self.vocab_size, size=shape)

    def _run(self, test: Test, tokens: int) -> list[float]:
        state, ids, now = self.state, self.ids(test), time.perf_counter
        self.rewind(state, test.depth)
        if test.prompt:
            stamps = [now()]
            self.chosen = self.prefill(ids, state)
            stamps.append(now())
        else:
            steps = islice(self.ways.get(test.way, self.steps)(ids[:, 0], state), tokens)
            stamps = [now()]
            for self.chosen in steps:
                stamps.append(now())
        return np.diff(stamps).tolist()


class DijiangSubject(Subject):
    """A DiJiang model.

    A depth is reached by a short real prompt and then by moving the position: the time of a step
    depends on neither the state's values nor the position, and prefilling 32,768 tokens for each
    test would take longer than the test.
    """

    def __init__(self, model: Model) -> None:
        session = model.session
        self.model, self.vocab_size, self.provider = model, model.spec.vocab_size, model.provider
        self.facts = {
            "graph": model.graph,
            "longest_piece": session.longest,
            "captured": getattr(session, "cuda_graph", None),
        }

    def prepare(self, tests: Sequence[Test]) -> None:
        """See Subject.prepare; what it runs on is measured here, as it is no part of loading."""
        self.facts["bandwidth"] = _bandwidth(self.model.session)
        super().prepare(tests)

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
        state.position[:] = depth

    def prefill(self, ids: np.ndarray, state: State) -> np.ndarray:
        return prefill(self.model, ids, state).tokens[:, 0]

    def steps(self, tokens: np.ndarray, state: State) -> Iterator[np.ndarray]:
        given: Any = SimpleNamespace(tokens=tokens[:, None])  # in the place of an output: what the loop feeds first
        records = decode(self.model, given, state, greedy(self.model, len(tokens)))
        next(records)  # of the tokens that were given
        return (np.array([record.token for record in step]) for step in records)


def _bandwidth(session: Session) -> float | None:
    """Bytes a second of the device's memory; None: it has no room for that, or is the CPU's."""
    if isinstance(session, DeviceSession):
        with suppress(SessionError):
            return device_bandwidth(session.row, session.index).bytes_per_second
    return None


#: load(path, threads, provider) -> subject; importable by name, as it crosses processes.
Load = Callable[[str, "int | None", str], Subject]


@dataclass(frozen=True, eq=False)
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

    def to_dict(self) -> dict[str, Any]:
        """One of a report's `models`."""
        known = {"name": self.name, "path": self.path, "baseline_of": self.baseline_of}
        return known | {"traffic": vars(self.traffic), **self.facts}


def load_bundle(path: str, threads: int | None, provider: str) -> DijiangSubject:
    """A bundle, in the process that measures it."""
    return DijiangSubject(load(path, provider=provider, threads=threads, check_hashes=False))


def bundle_side(name: str, bundle: Bundle, loads: Load = load_bundle) -> Side:
    """A bundle as a side; InputError for one without the exporter's note of the bytes that a step reads."""
    manifest = bundle.manifest
    reads = next(iter(manifest.graphs.values())).reads
    if not reads:
        raise InputError("the bundle does not say how many bytes a step reads; export it again")
    facts = {
        "kind": "dijiang",
        "precision": manifest.recipe.precision,
        "graph": ", ".join(manifest.graphs),
        "bytes": bundle.nbytes,
        "weight_bytes": bundle.data_bytes,
        "parameter_count": manifest.parameters,
        "spec": manifest.spec.to_dict(),
    }
    traffic = Traffic(reads["step"], reads["token"], manifest.spec.state_bytes)
    return Side(name, str(bundle.path), loads, traffic, facts)


def _peak_host_bytes() -> int | None:
    """VmHWM counts this program alone; getrusage would count the parent's pages from before the exec."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _device_bytes() -> int | None:
    """GPU memory of this process on all GPUs, as NVML shows it; None where it does not."""
    nvml = load_nvml()
    if nvml is None:
        return None
    shown = [answered(nvml.nvmlDeviceGetComputeRunningProcesses, gpu) for gpu in handles(nvml).values()]
    if None in shown:
        return None
    ours = [one.usedGpuMemory or 0 for found in shown for one in found if one.pid == os.getpid()]
    return sum(ours) if ours else None  # a container may show no processes, or other numbers of them
