"""ONNX Runtime on a GPU: state, tokens and logits stay there, and a decode step is one CUDA graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...bundle import names
from ...bundle.manifest import Bundle
from ...errors import SessionError
from ..decode import Decoder, SessionDecoder
from ..state import State
from .base import PIECE, import_onnxruntime
from .preflight import check_single_onnxruntime, explain, require_gpu
from .providers import PROVIDERS
from .resident import Resident

#: Head sizes up to this have LinearAttention kernels for any length on CUDA. Beyond, a state does not
#: fit into shared memory, and only the kernels for up to 16 tokens do without (onnxruntime-gpu 1.31.1
#: takes 16 and refuses 17).
LARGEST_PREFILL_HEAD, LARGE_HEAD_PIECE = 128, 16
#: Calls compared before CUDA graphs are trusted: both sides of the states warm up, are captured and are
#: replayed. Opening a session costs them with and without graphs, of one token and of a whole piece.
PROOF_STEPS = 2 * 3
#: Of onnxruntime's log.
FATAL = 4
#: The graph id with which ONNX Runtime neither captures nor replays.
NO_GRAPH = -1


class DeviceSession:
    """A session of an execution provider with memory of its own.

    cuda_graph: whether decode steps and whole pieces of a prompt are replayed CUDA graphs. None asks for
    them where the provider has them, and keeps them only if they gave the same logits and states as
    without, bit for bit; True makes a difference an error.
    """

    def __init__(
        self, bundle: Bundle, provider: str, device: int = 0, *, cuda_graph: bool | None = None
    ) -> None:
        self._bundle, self._row, self._index = bundle, PROVIDERS[provider], device
        self._spec = bundle.manifest.spec
        self._ort = self._import(provider)
        if cuda_graph and not self._row.captures:
            raise SessionError(f"provider {provider} has no CUDA graphs; leave --cuda-graph out")
        #: Tokens of the calls that are captured.
        self._captured: frozenset[int] = frozenset()
        self._open(graphs=self._row.captures and cuda_graph is not False)
        if self._graphs_on:
            self._prove(insist=bool(cuda_graph))

    def _prove(self, *, insist: bool) -> None:
        """Capture decode steps and whole pieces, each if that changes nothing."""
        lengths, proven = sorted({1, self.longest}), set()
        for length in lengths:
            difference = self._graph_difference(length)
            if not difference:
                proven.add(length)
            elif insist:
                raise SessionError(f"CUDA graphs change the result ({difference}); use --no-cuda-graph")
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
        fused = self._bundle.manifest.dialect != "primitive"
        return LARGE_HEAD_PIECE if fused and self._spec.head_size > LARGEST_PREFILL_HEAD else PIECE

    def _import(self, name: str) -> Any:
        check_single_onnxruntime()
        ort = import_onnxruntime()
        if self._row.execution_provider not in ort.get_available_providers():
            raise SessionError(
                f"execution provider {name!r} is not available: onnxruntime {ort.__version__} has "
                f"{', '.join(ort.get_available_providers())}; {self._row.install}"
            )
        if self._row.memory == "cuda":
            require_gpu(ort, self._index, self._row.library, self._bundle, 2 * self._spec.state_bytes)
            ort.set_default_logger_severity(FATAL)  # what it says is in the errors that it raises
        return ort

    def _open(self, *, graphs: bool) -> None:
        """Load the graph and assert that what was asked for runs it."""
        self._graphs_on = graphs
        row, options = self._row, self._ort.SessionOptions()
        options.log_severity_level = FATAL
        if row.whole and self._bundle.manifest.dialect != "primitive":
            # primitive computes shapes on the CPU; of the others a node left there is an error.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings = {"device_id": str(self._index)} if row.memory == "cuda" else {}
        if row.captures:
            settings["enable_cuda_graph"] = str(int(graphs))
        try:
            self._session = self._ort.InferenceSession(
                str(self._bundle.graph),
                sess_options=options,
                providers=[(row.execution_provider, settings | row.options)],
                enable_fallback=0,
            )
        except Exception as error:
            raise explain(
                error, f"{self._bundle.graph}: {row.execution_provider} cannot load it"
            ) from error
        self.provider = self._session.get_providers()[0]
        if self.provider != row.execution_provider:
            raise SessionError(
                f"asked for {row.execution_provider}, onnxruntime used {self.provider}; {row.install}"
            )
        self._slots: dict[int, _Slot] = {}
        self._graphs = 0

    def run(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, kept: np.ndarray, state: State
    ) -> np.ndarray:
        """See Session.run."""
        logits: np.ndarray = self._step(ids, positions, mask, kept, state).logits.numpy()
        return logits

    def next_tokens(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, kept: np.ndarray, state: State
    ) -> np.ndarray:
        """As `run`, but the most likely token of each kept position, [B, N] int64."""
        tokens: np.ndarray = self._step(ids, positions, mask, kept, state).tokens.numpy()
        return tokens

    def decoder(self, state: State) -> Decoder:
        """See Session.decoder."""
        return SessionDecoder(self, state)

    def _step(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, kept: np.ndarray, state: State
    ) -> _Binding:
        try:
            if state.batch not in self._slots:
                self._slots[state.batch] = _Slot(self, state)
            slot = self._slots[state.batch]
            slot.resident.take(state)
            binding = slot.binding(ids.shape, kept.shape)
            for buffer, array in zip(binding.inputs, (ids, positions, mask, kept), strict=True):
                buffer.write(np.ascontiguousarray(array, np.int64))
            self._session.run_with_iobinding(binding.io, binding.options)
        except SessionError:
            raise
        except Exception as error:
            raise explain(error, f"{self.provider} failed in a step of {ids.shape[1]} tokens") from error
        slot.resident.swap()
        return binding

    def _graph_difference(self, length: int) -> str:
        """What CUDA graphs change in a few calls of `length` tokens; empty: nothing, bit for bit."""
        found = []
        ids = np.arange(PROOF_STEPS * length).reshape(PROOF_STEPS, 1, length)
        ones, last = np.ones((1, length), np.int64), np.array([[length - 1]])
        for captured in (frozenset[int](), frozenset({length})):
            self._captured = captured
            state = State.empty(1, self._spec.num_layers, self._spec.state_shape)
            try:
                logits = [
                    self.run(
                        piece % self._spec.vocab_size, self._positions(piece), ones, last, state
                    ).copy()
                    for piece in ids
                ]
            except SessionError as error:
                return str(error)
            finally:
                self._slots.clear()
            found.append([*logits, *state.layers])
        changed = sum(not np.array_equal(a, b, equal_nan=True) for a, b in zip(*found, strict=True))
        return f"{changed} of {len(found[0])} results" if changed else ""

    def _positions(self, positions: np.ndarray) -> np.ndarray:
        """Within what the model has."""
        limit = self._bundle.manifest.positions_limit
        return positions if limit is None else positions % limit

    def new_graph(self) -> int:
        """The next free graph id; 0 is onnxruntime's own."""
        self._graphs += 1
        return self._graphs

    def captures(self, shape: tuple[int, ...], kept: tuple[int, ...]) -> bool:
        """Whether calls of this shape are captured: those that come again, with one row of logits."""
        return shape[1] in self._captured and kept[1] == 1


class _Tensor:
    """An OrtValue in the provider's memory."""

    def __init__(self, session: DeviceSession, shape: tuple[int, ...], dtype: Any) -> None:
        memory, index = session._row.memory, session._index
        self.value = session._ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), dtype, memory, index if memory != "cpu" else 0
        )

    def write(self, array: np.ndarray) -> None:
        self.value.update_inplace(array)

    def read(self, array: np.ndarray) -> None:
        array[...] = self.value.numpy()

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        data: np.ndarray = self.value.numpy()
        return data


class _Slot:
    """The buffers of one batch size, and what is bound to them."""

    def __init__(self, session: DeviceSession, state: State) -> None:
        self._session = session
        sets = [[_Tensor(session, shape, np.float32) for shape in state.shapes] for _ in range(2)]
        self.resident = Resident((sets[0], sets[1]))
        self._bindings: dict[tuple[Any, ...], _Binding] = {}

    def binding(self, shape: tuple[int, ...], kept: tuple[int, ...]) -> _Binding:
        """Of these shapes from the side whose turn it is. Decode steps and graphs stay, and the last."""
        key = (shape, kept, self.resident.side)
        if key not in self._bindings:
            self._bindings = {
                k: b
                for k, b in self._bindings.items()
                if k[0][1] == 1 or b.graph != NO_GRAPH or k[:2] == key[:2]
            }
            self._bindings[key] = _Binding(self._session, self.resident, shape, kept)
        return self._bindings[key]


class _Binding:
    """Inputs and outputs of one shape and side, with their CUDA graph if they have one."""

    def __init__(
        self,
        session: DeviceSession,
        resident: Resident[_Tensor],
        shape: tuple[int, ...],
        kept: tuple[int, ...],
    ) -> None:
        self.inputs = [_Tensor(session, size, np.int64) for size in (shape, shape, shape, kept)]
        self.logits = _Tensor(session, (*kept, session._spec.vocab_size), np.float32)
        self.tokens = _Tensor(session, kept, np.int64)
        self.io = session._session.io_binding()
        for name, tensor in zip(names.INPUTS, self.inputs, strict=True):
            self.io.bind_ortvalue_input(name, tensor.value)
        self.io.bind_ortvalue_output(names.LOGITS, self.logits.value)
        self.io.bind_ortvalue_output(names.NEXT_TOKENS, self.tokens.value)
        for layer, (past, present) in enumerate(zip(resident.past, resident.present, strict=True)):
            self.io.bind_ortvalue_input(names.past_state(layer), past.value)
            self.io.bind_ortvalue_output(names.present_state(layer), present.value)
        self.graph = session.new_graph() if session.captures(shape, kept) else NO_GRAPH
        self.options = session._ort.RunOptions()
        if session._row.captures:
            self.options.add_run_config_entry("gpu_graph_id", str(self.graph))
