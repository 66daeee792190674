"""A bundle's TensorRT engine, by TensorRT or TensorRT-RTX: state and logits stay on the GPU."""

from __future__ import annotations

import threading
from functools import cached_property
from mmap import ACCESS_READ, mmap
from typing import Any
from weakref import finalize

import numpy as np

from ...bundle import names
from ...bundle.opened import Bundle
from ...errors import SessionError
from ...machine.driver import Cuda
from ...machine.memory import require_gpu_memory
from ..options import Loading
from ..state import State
from ..step import Step
from .engines import BACKENDS, EngineRecord, import_backend
from .resident import Resident

#: Memory that a device needs beside engine, scratch and states: CUDA's own, and what the desktop uses.
SPARE_BYTES = 256 << 20
#: Key of the context for prompts' rests, which have any length.
ANY_LENGTH = 0


class TensorRtSession:
    """One engine; a decode step, and a whole piece of a prompt, is one captured CUDA graph, unless
    cuda_graph is False.

    The step that is captured reads one set of state buffers and writes the other. So both directions
    are captured, the warm-up before a capture leaves no trace, and no engine needs in-place outputs.
    """

    ragged = False

    def __init__(
        self, bundle: Bundle, graph: str, backend: str, device: int = 0, *, cuda_graph: bool | None = None
    ) -> None:
        self.graph = graph
        #: One step at a time: its states take turns in the device's buffers.
        self._running = threading.RLock()
        engines = bundle.manifest.engines
        if backend not in engines:
            raise SessionError(
                f"{bundle.path} has no {backend} engine, it has {', '.join(engines) or 'none'}; "
                f"run dijiang build {bundle.path} --backend {backend}"
            )
        self._record = EngineRecord.from_dict(engines[backend])
        self._title = BACKENDS[backend].title
        self.cuda = Cuda(device)
        self._trt = import_backend(backend)
        self._record.require(self._trt.__version__, self.cuda.gpu)
        self.spec = bundle.manifest.spec
        self.provider = f"{self._title} {self._trt.__version__}"
        self.longest, self.rows = self._record.longest, self._record.batch
        self._load(bundle)
        self.stream = self.cuda.stream()
        self._slots: dict[int, _Slot] = {}
        self.cuda_graph = cuda_graph is not False

    def _load(self, bundle: Bundle) -> None:
        path, spec = bundle.path / self._record.file, bundle.manifest.spec
        need = path.stat().st_size + 2 * self._record.batch * spec.state_bytes + SPARE_BYTES
        require_gpu_memory(str(path), need, self.cuda.gpu.free)
        trt = self._trt
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        # Mapped, not read: a Jetson's GPU and CPU share one memory, and the file's pages can go.
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise SessionError(
                f"{path}: {self.provider} cannot load it; rebuild with: "
                f"dijiang build {bundle.path} --backend {self._record.backend}"
            )
        self._engine = engine
        # Steps follow each other on one stream: all contexts can share one scratch memory.
        size = max(int(engine.device_memory_size_v2), 1)
        self._scratch = _Memory(self.cuda, 0, size)
        last = engine.num_optimization_profiles - 1
        self._profiles = {True: 0, False: last}

    def step(self, state: State) -> Step:
        return Step.single(state.batch)

    def run(self, step: Step, state: State) -> EngineOutput:
        with self._running, state.guard:
            return self._run(step, state)

    def _run(self, step: Step, state: State) -> EngineOutput:
        batch, length = step.ids.shape
        if batch > self._record.batch:
            raise SessionError(
                f"batch is {batch}, the engine takes {self._record.batch}; "
                f"rebuild with: dijiang build BUNDLE --batch {batch}"
            )
        self.cuda.activate()
        if batch not in self._slots:
            self._slots[batch] = _Slot(self, state)
        slot = self._slots[batch]
        side = slot.resident.take(state)
        arrays = {name: np.ascontiguousarray(a, np.int64) for name, a in step.arrays.items()}
        slot.require_outputs(step.kept.size)
        try:
            for name, array in arrays.items():
                slot.inputs[name].write(array)
            if self.cuda_graph and length in (1, self.longest) and step.kept.shape[1] == 1:
                self._replay(slot, length, side)
            else:
                key = (1, side) if length == 1 else (ANY_LENGTH, 0)
                self._enqueue(slot, self.context(slot, *key), step.ids.shape, step.kept.shape, side)
        finally:
            self.cuda.synchronize(self.stream)  # the arrays above may go, whatever happened
        state.commit(state.after(step, swap=True))
        return EngineOutput(self, slot, step.kept.shape)

    def context(self, slot: _Slot, length: int, side: int) -> Any:
        """The execution context for calls of a length from one side of this batch's states."""
        key = (length, side)
        if key not in slot.contexts:
            trt = self._trt
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
            if context is None:
                raise SessionError(
                    f"{self.provider} cannot create an execution context; "
                    "use a smaller model or batch, or end what else is on the GPU"
                )
            context.set_device_memory(self._scratch.address, self._scratch.nbytes)
            context.set_optimization_profile_async(self._profiles[length == 1], self.stream)
            slot.contexts[key] = context
        return slot.contexts[key]

    def _enqueue(self, slot: _Slot, context: Any, shape: tuple[int, ...], kept: tuple[int, ...], side: int) -> None:
        shapes = dict(zip(names.INPUTS, (shape, shape, shape, kept), strict=True))
        buffers = {**slot.inputs, **slot.outputs}
        for layer, (past, present) in enumerate(
            zip(slot.resident.past(side), slot.resident.present(side), strict=True)
        ):
            shapes[names.past_state(layer)] = (shape[0], *self.spec.state_shape)
            buffers[names.past_state(layer)] = past
            buffers[names.present_state(layer)] = present
        for name, size in shapes.items():
            if not context.set_input_shape(name, size):
                raise SessionError(f"{self.provider} does not take {name} of {list(size)}; rebuild it")
        for name, buffer in buffers.items():
            context.set_tensor_address(name, buffer.address)
        if not context.execute_async_v3(self.stream):
            raise SessionError(f"{self.provider} failed in a step of {shape[1]} tokens; see nvidia-smi")

    def _replay(self, slot: _Slot, length: int, side: int) -> None:
        """Launch the call of this length and side as a graph; the first time, capture it."""
        key = (length, side)
        if key not in slot.graphs:
            shapes = (slot.batch, length), (slot.batch, 1)
            context = self.context(slot, *key)
            # Once outside: kernels are loaded and shapes resolved, which a capture does not allow.
            self._enqueue(slot, context, *shapes, side)
            self.cuda.synchronize(self.stream)
            with self.cuda.capture(self.stream) as graphs:
                self._enqueue(slot, context, *shapes, side)
            slot.graphs[key] = graphs[0]
        self.cuda.launch(slot.graphs[key], self.stream)


class EngineOutput:
    """See Output: each result is copied to the host when it is asked for."""

    def __init__(self, session: TensorRtSession, slot: _Slot, kept: tuple[int, ...]) -> None:
        self._session, self._slot, self._kept = session, slot, kept

    @cached_property
    def logits(self) -> np.ndarray:
        found = np.empty((*self._kept, self._session.spec.vocab_size), np.float32)
        return self._fetch(names.LOGITS, found)

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._fetch(names.NEXT_TOKENS, np.empty(self._kept, np.int64))

    def _fetch(self, name: str, array: np.ndarray) -> np.ndarray:
        self._session.cuda.download(array, self._slot.outputs[name].address, self._session.stream)
        return array


class _Memory:
    """Device memory of one tensor, used in the order of a stream; freed when nothing refers to it."""

    def __init__(self, cuda: Cuda, stream: int, nbytes: int) -> None:
        self._cuda, self._stream, self.nbytes = cuda, stream, nbytes
        self.address = cuda.allocate(nbytes)
        self._freed = finalize(self, cuda.free, self.address)
        self._freed.atexit = False  # the driver may be gone by then, and the memory with it

    def write(self, array: np.ndarray) -> None:
        self._cuda.upload(self.address, array, self._stream)

    def read(self, array: np.ndarray) -> None:
        self._cuda.download(array, self.address, self._stream)


class _Slot:
    """Buffers, contexts and graphs of one batch size."""

    def __init__(self, session: TensorRtSession, state: State) -> None:
        self._session, self.batch = session, state.batch
        place = session.cuda, session.stream
        sets = [[_Memory(*place, 4 * int(np.prod(shape))) for shape in state.shapes] for _ in range(2)]
        self.resident = Resident((sets[0], sets[1]))
        most = 8 * state.batch * session.longest
        self.inputs = {name: _Memory(*place, most) for name in names.INPUTS}
        self.outputs: dict[str, _Memory] = {}
        #: By length and side.
        self.contexts: dict[tuple[int, int], Any] = {}
        self.graphs: dict[tuple[int, int], int] = {}
        self.require_outputs(state.batch)

    def require_outputs(self, count: int) -> None:
        """Make room for the logits of `count` positions; graphs that wrote elsewhere are dropped."""
        sizes = {names.LOGITS: 4 * count * self._session.spec.vocab_size, names.NEXT_TOKENS: 8 * count}
        for name, nbytes in sizes.items():
            old = self.outputs.get(name)
            if old is not None and old.nbytes >= nbytes:
                continue
            self.outputs[name] = _Memory(self._session.cuda, self._session.stream, nbytes)
            for graph in self.graphs.values():
                self._session.cuda.destroy(graph)
            self.graphs.clear()


def open_engine(bundle: Bundle, graph: str, detail: str, device: int, options: Loading) -> TensorRtSession:
    """The constructor of the provider table."""
    return TensorRtSession(bundle, graph, detail, device, cuda_graph=options.cuda_graph)
