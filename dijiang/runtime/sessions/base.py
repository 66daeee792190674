"""Running a bundle's graph: the Session protocol and its ONNX Runtime form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...bundle import names
from ...bundle.manifest import Bundle
from ...errors import SessionError
from ...machine.limits import usable_cores
from ..decode import Decoder
from ..native import operator_library
from ..state import State

#: Tokens of a prompt that go through the graph at once: bounds the memory of a prefill.
PIECE = 256
#: Precisions whose weights are blocks of integers, and the oldest onnxruntime that reads the blocks of
#: the primitive dialect: 1.18 loads them and fails in the first step.
INTEGERS, BLOCKS_FROM = ("int8", "int4"), (1, 19)
#: --provider -> ONNX Runtime execution provider.
PROVIDERS = {"cpu": "CPUExecutionProvider"}
#: Where a graph without a file of its own finds its data.
DATA_FOLDER = "session.model_external_initializers_file_folder_path"


class Session(Protocol):
    """One step of the graph over up to `longest` tokens."""

    @property
    def longest(self) -> int:
        """Tokens a call at most."""
        ...

    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        mask: np.ndarray,
        kept: np.ndarray,
        state: State,
    ) -> np.ndarray:
        """Logits [B, N, vocab] float32 of the kept tokens; `state.layers` are advanced in place.

        ids, positions, mask [B, T] int64; kept [B, N] int64, indices into T.
        """
        ...

    def next_tokens(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        mask: np.ndarray,
        kept: np.ndarray,
        state: State,
    ) -> np.ndarray:
        """As `run`, but the most likely token of each kept position, [B, N] int64."""
        ...

    def decoder(self, state: State) -> Decoder:
        """Steps of one token for a state of batch 1."""
        ...


def import_onnxruntime() -> Any:
    """The onnxruntime module; SessionError where none is installed."""
    try:
        import onnxruntime
    except ImportError:
        raise SessionError(
            "no backend: onnxruntime is not installed; pip install 'dijiang[cpu]' or 'dijiang[gpu]'"
        ) from None
    return onnxruntime


def check_blocks(bundle: Bundle, onnxruntime: str) -> None:
    """SessionError if this version of onnxruntime does not run the bundle's integer weights."""
    manifest = bundle.manifest
    found = tuple(int(part) for part in onnxruntime.split(".")[:2])
    if manifest.dialect == "primitive" and manifest.precision in INTEGERS and found < BLOCKS_FROM:
        raise SessionError(
            f"{bundle.path}: the {manifest.precision} blocks of the primitive dialect need onnxruntime "
            f"{'.'.join(map(str, BLOCKS_FROM))} or newer, here is {onnxruntime}; upgrade it, or export "
            "with --precision fp16 or fp32"
        )


def session_options(ort: Any, threads: int | None, operators: Path | None = None) -> Any:
    """Options of every session here.

    threads: None: as many as usable cores.  operators: library of those that the graph has of ours.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # memory stays flat after a long prefill
    # Measured in docs/performance.md: 8 % of a decode step together.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.dynamic_block_base", "4")
    options.intra_op_num_threads = threads or usable_cores()
    if operators is not None:
        options.register_custom_ops_library(str(operators))
    return options


def load_graph(bundle: Bundle, threads: int | None = None, graph: bytes | None = None) -> Any:
    """onnxruntime's session on the CPU; SessionError if it does not take the graph.

    graph: instead of the bundle's own, in serialised form: it refers to the bundle's data.
    """
    ort, manifest = import_onnxruntime(), bundle.manifest
    check_blocks(bundle, ort.__version__)
    options = session_options(ort, threads, operator_library() if manifest.dialect == "native" else None)
    if graph is not None:
        options.add_session_config_entry(DATA_FOLDER, str(bundle.path.resolve()))
    try:
        return ort.InferenceSession(graph or str(bundle.graph), options, [PROVIDERS["cpu"]])
    except Exception as error:  # onnxruntime's errors share no base class
        other = "" if manifest.dialect == "primitive" else ", or export with --dialect primitive"
        raise SessionError(
            f"{bundle.graph}: onnxruntime {ort.__version__} cannot load the {manifest.dialect} dialect "
            f"({str(error).splitlines()[0]}); upgrade onnxruntime{other}"
        ) from error


def failed_step(tokens: int, error: Exception) -> SessionError:
    """The error of a step that onnxruntime gave up."""
    return SessionError(
        f"onnxruntime {import_onnxruntime().__version__} failed in a step of {tokens} tokens "
        f"({str(error).splitlines()[0][:200]}); use a smaller batch, or upgrade onnxruntime"
    )


class OrtSession:
    """ONNX Runtime session with states bound once and updated in place.

    Where the dialect's attention node allows it the same memory is bound as past and present state;
    otherwise two sets of buffers take turns and the newer one is copied back.
    """

    longest = PIECE

    def __init__(self, bundle: Bundle, *, provider: str = "auto", threads: int | None = None) -> None:
        ort = import_onnxruntime()
        wanted = PROVIDERS.get("cpu" if provider == "auto" else provider)
        if wanted is None or wanted not in ort.get_available_providers():
            raise SessionError(
                f"execution provider {provider!r} is not available, expected one of "
                f"{', '.join(PROVIDERS)}; install the package that has it"
            )
        self._session = load_graph(bundle, threads)
        used = self._session.get_providers()[0]
        if used != wanted:
            raise SessionError(f"asked for {wanted}, onnxruntime used {used}; check its installation")
        self.provider = used
        self._ort = ort
        self._in_place = bundle.manifest.in_place
        self._vocab = bundle.manifest.spec.vocab_size
        self._step: _Binding | None = None

    def run(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, kept: np.ndarray, state: State
    ) -> np.ndarray:
        """See Session.run. The logits' memory is reused by the next decode step of this state."""
        return self._advance(ids, positions, mask, kept, state).logits

    def next_tokens(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, kept: np.ndarray, state: State
    ) -> np.ndarray:
        """See Session.next_tokens."""
        return self._advance(ids, positions, mask, kept, state).tokens

    def decoder(self, state: State) -> Decoder:
        """See Session.decoder: a binding of its own."""
        return _BoundDecoder(_Binding(self._ort, self._session, state, (1, 1), (1, 1), self), state)

    def _advance(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, kept: np.ndarray, state: State
    ) -> _Binding:
        binding = self._step
        if binding is None or not binding.fits(state, ids.shape, kept.shape):
            binding = _Binding(self._ort, self._session, state, ids.shape, kept.shape, self)
            if ids.shape[1] == 1:
                self._step = binding
        for buffer, array in zip(binding.inputs.values(), (ids, positions, mask, kept), strict=True):
            buffer[...] = array
        binding.run()
        return binding

    @property
    def in_place(self) -> bool:
        """Whether past and present state share memory."""
        return self._in_place

    @property
    def vocab(self) -> int:
        """Width of the logits."""
        return self._vocab


class _Binding:
    """Buffers of one shape bound to one state: made once, run many times."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        state: State,
        shape: tuple[int, ...],
        kept_shape: tuple[int, ...],
        owner: OrtSession,
    ) -> None:
        self._ort, self._session, self._state = ort, session, state
        self._shape, self._kept_shape = shape, kept_shape
        self._io = session.io_binding()
        self.inputs = {
            name: np.zeros(size, np.int64)
            for name, size in (
                (names.INPUT_IDS, shape),
                (names.POSITION_IDS, shape),
                (names.ATTENTION_MASK, shape),
                (names.LOGIT_INDICES, kept_shape),
            )
        }
        self.logits = np.empty((*kept_shape, owner.vocab), np.float32)
        self.tokens = np.empty(kept_shape, np.int64)
        layers = state.layers
        self._next = layers if owner.in_place else [np.empty_like(layer) for layer in layers]
        # The OrtValues share the arrays' memory and must live as long as the binding.
        self._values = {name: self._value(ort, array) for name, array in self.inputs.items()}
        for name, value in self._values.items():
            self._io.bind_ortvalue_input(name, value)
        self._outputs = [self._value(ort, array) for array in (self.logits, self.tokens)]
        for name, value in zip((names.LOGITS, names.NEXT_TOKENS), self._outputs, strict=True):
            self._io.bind_ortvalue_output(name, value)
        for i, (past, present) in enumerate(zip(layers, self._next, strict=True)):
            source = self._value(ort, past)
            target = source if past is present else self._value(ort, present)
            self._io.bind_ortvalue_input(names.past_state(i), source)
            self._io.bind_ortvalue_output(names.present_state(i), target)
            self._outputs += [source, target]

    @staticmethod
    def _value(ort: Any, array: np.ndarray) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array)

    def fits(self, state: State, shape: tuple[int, ...], kept_shape: tuple[int, ...]) -> bool:
        """Whether this binding serves a call."""
        return self._state is state and self._shape == shape and self._kept_shape == kept_shape

    def run(self) -> None:
        """Advance the state over what is in `inputs`; results in `logits` and `tokens`."""
        try:
            self._session.run_with_iobinding(self._io)
        except Exception as error:  # onnxruntime's errors share no base class
            raise failed_step(self._shape[1], error) from error
        if self._next is not self._state.layers:
            for layer, new in zip(self._state.layers, self._next, strict=True):
                layer[...] = new


class _BoundDecoder:
    """The Decoder whose inputs and results are the bound memory itself."""

    def __init__(self, binding: _Binding, state: State) -> None:
        self._binding, self._state = binding, state
        self._ids, self._positions = (
            binding.inputs[name] for name in (names.INPUT_IDS, names.POSITION_IDS)
        )
        binding.inputs[names.ATTENTION_MASK][...] = 1
        self._logits, self._tokens = binding.logits[0, 0], binding.tokens

    def logits(self, token: int) -> np.ndarray:
        """See Decoder.logits."""
        self._advance(token)
        return self._logits

    def pick(self, token: int) -> int:
        """See Decoder.pick."""
        self._advance(token)
        return int(self._tokens[0, 0])

    def _advance(self, token: int) -> None:
        position = self._state.position
        self._ids[0, 0] = token
        self._positions[0, 0] = position[0]
        self._binding.run()
        position[0] += 1
