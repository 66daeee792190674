"""ONNX Runtime on a GPU: state, tokens and logits stay there, and a decode step is captured once."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import numpy as np

from ...bundle import names
from ...bundle.opened import Bundle
from ...errors import SessionError
from ...machine.memory import SPARE_BYTES, require_gpu_memory
from ...recipe import GRAPHS, named
from ..options import Loading
from ..state import State
from ..step import Step
from .base import PIECE
from .device import Device, Tensor
from .kernels import load_kernels
from .preflight import explain
from .resident import Resident

#: Head sizes up to this have LinearAttention kernels for any length on CUDA. Beyond, a state does not
#: fit into shared memory, and only the kernels for up to 16 tokens do without (onnxruntime-gpu 1.31.1
#: takes 16 and refuses 17).
LARGEST_PREFILL_HEAD, LARGE_HEAD_PIECE = 128, 16
#: Calls compared before captured ones are trusted: both sides of the states warm up, are captured and are
#: replayed. Opening a session costs them with and without graphs, of one token and of a whole piece.
PROOF_STEPS = 2 * 3
#: The graph id with which ONNX Runtime neither captures nor replays.
NO_GRAPH = -1


class DeviceSession:
    """A session of an execution provider with memory of its own.

    cuda_graph: whether decode steps, and whole pieces of a prompt where the row says so, are captured and
    replayed: as CUDA graphs, or as WebGPU's recorded commands. None asks for that where the provider has
    it, and keeps it only if it gave the same logits and states as without, bit for bit; True makes a
    difference an error.
    """

    ragged, rows = False, None

    def __init__(
        self, bundle: Bundle, graph: str, row: Device, device: int = 0, *, cuda_graph: bool | None = None
    ) -> None:
        self.graph = graph
        #: One step at a time: its states take turns in the device's buffers.
        self._running = threading.RLock()
        self._bundle, self.row, self.index = bundle, row, device
        self.spec = bundle.manifest.spec
        self.ort = row.require(device)
        self.require_room(str(bundle.path), bundle.data_bytes + 2 * self.spec.state_bytes + SPARE_BYTES)
        if cuda_graph and not row.captures:
            raise SessionError(f"provider {row.name} captures no steps; leave --cuda-graph out")
        #: Tokens of the calls that are captured.
        self._captured: frozenset[int] = frozenset()
        graphs = bool(row.captures) and cuda_graph is not False
        self._open(graphs=graphs)
        if graphs:
            self._prove(insist=bool(cuda_graph))

    def require_room(self, what: str, need: int) -> None:
        """SessionError if the device is known to have less than `need` bytes left."""
        free = self.row.free(self.index)
        if free is not None:
            require_gpu_memory(what, need, free)

    def _prove(self, *, insist: bool) -> None:
        """Capture decode steps and whole pieces, each if that changes nothing."""
        lengths, proven = sorted({1, self.longest} if self.row.pieces else {1}), set()
        for length in lengths:
            difference = self._graph_difference(length)
            if not difference:
                proven.add(length)
            elif insist:
                raise SessionError(f"captured steps change the result ({difference}); use --no-cuda-graph")
        if len(proven) < len(lengths):  # a capture that failed may have left the session unusable
            self._open(graphs=bool(proven))
        self._captured = frozenset(proven)

    @property
    def cuda_graph(self) -> bool:
        """Whether decode steps are replayed CUDA graphs."""
        return 1 in self._captured

    @property
    def longest(self) -> int:
        """Tokens a call at most."""
        row = GRAPHS[self.graph]
        fused = row.on_device and not row.own_kernels
        return LARGE_HEAD_PIECE if fused and self.spec.head_size > LARGEST_PREFILL_HEAD else PIECE

    def _open(self, *, graphs: bool) -> None:
        """Load the graph; what was open before is dropped."""
        # A graph that computes shapes on the CPU cannot do without it; of the others a node left there
        # is an error.
        whole = GRAPHS[self.graph].on_device
        file, own = self._bundle.graph_file(self.graph), GRAPHS[self.graph].own_kernels
        if own:
            load_kernels(self.index)
        self._session = self.row.open(file, self.index, graphs=graphs, whole=whole, operators=own)
        self.provider = self.row.title(self.index)
        self._slots: dict[int, _Slot] = {}
        self._graphs = 0

    def step(self, state: State) -> Step:
        return Step.single(state.batch)

    def run(self, step: Step, state: State) -> DeviceOutput:
        """See Session.run. If it fails, the state is as it was before, or refused from then on."""
        with self._running, state.guard:
            return self._run(step, state)

    def _run(self, step: Step, state: State) -> DeviceOutput:
        end = self.row.end
        if end is not None and step.positions.max() >= end:
            raise SessionError(
                f"position {step.positions.max()} is past {end - 1}, the last that {self.provider} computes "
                "right; use --provider cpu, or start a new state"
            )
        try:
            if state.batch not in self._slots:
                self._slots[state.batch] = _Slot(self, state)
            slot = self._slots[state.batch]
            binding = slot.binding(step.ids.shape, step.kept.shape, slot.resident.take(state))
            for buffer, array in zip(binding.inputs, step.arrays.values(), strict=True):
                buffer.update(np.ascontiguousarray(array, np.int64))
            binding.tokens.known = None
            self._session.run_with_iobinding(binding.io, binding.options)
        except Exception as error:
            self._save(state)
            if isinstance(error, SessionError):
                raise
            raise explain(error, f"{self.provider} failed in a step of {step.ids.shape[1]} tokens") from error
        state.commit(state.after(step, swap=True))
        return DeviceOutput(binding)

    def _save(self, state: State) -> None:
        """Bring the state home after a step that failed; what the device has lost is refused from now on."""
        try:
            state.bring_home()
        except SessionError:
            state.tear("the device has lost its numbers")
            self._slots.pop(state.batch, None)

    def _graph_difference(self, length: int) -> str:
        """What capturing changes in a few calls of `length` tokens; empty: nothing, bit for bit."""
        found = []
        ids = np.arange(PROOF_STEPS * length).reshape(PROOF_STEPS, 1, length) % self.spec.vocab_size
        last, limit = np.array([[length - 1]]), self._bundle.manifest.positions_limit
        for captured in (frozenset[int](), frozenset({length})):
            self._captured = captured
            state = State.empty(1, self.spec, self._bundle.manifest.fingerprint)
            try:
                logits = []
                for piece in ids:
                    step = Step.of(piece, state.position, last)
                    if limit is not None:
                        step.positions[...] %= limit
                    logits.append(self.run(step, state).logits.copy())
            except SessionError as error:
                return str(error)
            finally:
                self._slots.clear()
            found.append([*logits, *state.layers])
        changed = sum(not np.array_equal(a, b, equal_nan=True) for a, b in zip(*found, strict=True))
        return f"{changed} of {len(found[0])} results" if changed else ""

    def tensor(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """A new tensor on the device."""
        return Tensor(self.ort, self.row, self.index, shape, dtype)

    def new_graph(self) -> int:
        """The next free graph id; 0 is onnxruntime's own."""
        self._graphs += 1
        return self._graphs

    def captures(self, shape: tuple[int, ...], kept: tuple[int, ...]) -> bool:
        """Whether calls of this shape are captured: those that come again, with one row of logits."""
        return shape[1] in self._captured and kept[1] == 1


class DeviceOutput:
    """See Output: each result is copied to the host when it is asked for."""

    def __init__(self, binding: _Binding) -> None:
        self._binding = binding

    @cached_property
    def logits(self) -> np.ndarray:
        return self._binding.logits.numpy()

    @cached_property
    def tokens(self) -> np.ndarray:
        tokens = self._binding.tokens
        tokens.known = found = tokens.numpy()
        return found


class _Slot:
    """The buffers of one batch size, and what is bound to them."""

    def __init__(self, session: DeviceSession, state: State) -> None:
        self._session = session
        session.require_room(f"a state of batch {state.batch}", 2 * state.nbytes)
        sets = [[session.tensor(shape, np.float32) for shape in state.shapes] for _ in range(2)]
        for tensor in [*sets[0], *sets[1]] if session.row.silent else ():
            tensor.prove()
        self.resident = Resident((sets[0], sets[1]))
        #: Of decode steps: what one side chooses is what the other is fed.
        self.ids = [session.tensor((state.batch, 1), np.int64) for _ in range(2)]
        self._bindings: dict[tuple[Any, ...], _Binding] = {}

    def binding(self, shape: tuple[int, ...], kept: tuple[int, ...], side: int) -> _Binding:
        """Of these shapes from a side. Decode steps and graphs stay, and the last."""
        key = (shape, kept, side)
        if key not in self._bindings:
            self._bindings = {
                k: b for k, b in self._bindings.items() if k[0][1] == 1 or b.graph != NO_GRAPH or k[:2] == key[:2]
            }
            self._bindings[key] = _Binding(self._session, self, shape, kept, side)
        return self._bindings[key]


class _Binding:
    """Inputs and outputs of one shape and side, with their CUDA graph if they have one."""

    def __init__(
        self, session: DeviceSession, slot: _Slot, shape: tuple[int, ...], kept: tuple[int, ...], side: int
    ) -> None:
        ids, *others = (session.tensor(size, np.int64) for size in (shape, shape, shape, kept))
        self.tokens = session.tensor(kept, np.int64)
        if shape[1] == 1:
            ids, self.tokens = slot.ids[side], slot.ids[1 - side]
        self.inputs, resident = [ids, *others], slot.resident
        self.logits = session.tensor((*kept, session.spec.vocab_size), np.float32)
        self.io = session._session.io_binding()
        for name, tensor in zip(names.INPUTS, self.inputs, strict=True):
            self.io.bind_ortvalue_input(name, tensor.value)
        self.io.bind_ortvalue_output(names.LOGITS, self.logits.value)
        self.io.bind_ortvalue_output(names.NEXT_TOKENS, self.tokens.value)
        ends = zip(resident.past(side), resident.present(side), strict=True)
        for layer, (past, present) in enumerate(ends):
            self.io.bind_ortvalue_input(names.past_state(layer), past.value)
            self.io.bind_ortvalue_output(names.present_state(layer), present.value)
        self.graph = session.new_graph() if session.captures(shape, kept) else NO_GRAPH
        self.options = session.ort.RunOptions()
        if session.row.captures:
            self.options.add_run_config_entry("gpu_graph_id", str(self.graph))


def open_device(bundle: Bundle, graph: str, detail: str, device: int, options: Loading) -> DeviceSession:
    """The constructor of the provider table."""
    return DeviceSession(bundle, graph, named(detail), device, cuda_graph=options.cuda_graph)
