"""ONNX Runtime on the CPU, with states bound once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import names
from ...bundle.opened import Bundle
from ...errors import SessionError
from ...machine.memory import MORE, is_no_memory, require_memory, run_bytes
from ...recipe import GRAPHS
from ..options import Loading
from ..snapshot import NONE
from ..state import State
from ..step import Shapes, Step
from .base import PIECE
from .inference import (
    UNPACKED,
    failed_step,
    first_line,
    import_onnxruntime,
    is_onnxruntimes,
    open_inference,
    upgrade,
)

#: Bindings that are kept: of a decode step, and of ragged steps of several lengths.
KEPT = 8


class CpuSession:
    """See `Session`.

    A decode step, and a ragged one, writes the new state over the old one where the graph allows it, else two sets
    of arrays take turns. A piece of a prompt writes to new arrays: if it fails, nothing has happened.
    """

    longest = PIECE

    def __init__(
        self,
        bundle: Bundle,
        graph: str,
        *,
        threads: int | None = None,
        file: Path | None = None,
        unpacked: bool = False,
    ) -> None:
        """Load a graph of a bundle.

        Args:
            file: another form of it, as `parity.emulation` writes.
            unpacked: see `load_graph`.
        """
        require_memory(
            str(bundle.path),
            run_bytes(bundle.data_bytes, bundle.manifest.spec.state_bytes),
            "close something, or use a smaller model or precision",
        )
        self.graph = graph
        self._ort = import_onnxruntime()
        source = file or bundle.graph_file(graph)
        self._session = load_graph(bundle, graph, source, threads=threads, unpacked=unpacked)
        self.provider = str(self._session.get_providers()[0])
        self._in_place = bundle.manifest.graphs[graph].in_place
        self._vocab = bundle.manifest.spec.vocab_size
        self._inputs = inputs_of(self._session)
        self.ragged, self.rows = names.SEQUENCE_STARTS in self._inputs, None
        self._kept: list[Binding] = []

    def step(self, state: State) -> Step:
        """See Session.step."""
        found = self._found(state, Step.single_shapes(state.batch))
        step = (found or self._bound(state, Step.single(state.batch))).step
        step.mask[...] = 1  # a padded step may have gone through the same memory
        return step

    def run(self, step: Step, state: State) -> Binding:
        """See Session.run. The results' memory is reused by the next decode step of this state."""
        with state.guard:
            return self._run(step, state)

    def _run(self, step: Step, state: State) -> Binding:
        state.settle()
        state.bring_home()
        binding = self._found(state, step.shapes) or self._bound(state, step)
        if step is not binding.step:
            binding.copy(step)
        binding.tokens[...] = NONE
        shared = binding.present is binding.past
        point = state.after(step, None if shared else binding.present)
        if shared:
            state.expect(point, binding.tokens)
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:
            if not is_onnxruntimes(error) or binding.tokens.flat[0] != NONE:
                raise  # from a signal's handler: the step has not begun, or has ended
            if shared:
                state.tear(first_line(error)[:100])
            raise failed_step(step.ids.shape[1], error) from error
        state.commit(point)
        return binding

    def _found(self, state: State, shapes: Shapes) -> Binding | None:
        """Buffers of these shapes that were kept, bound to where the state is."""
        layers = state.point.layers
        return next((binding for binding in self._kept if binding.fits(layers, shapes)), None)

    def _bound(self, state: State, step: Step) -> Binding:
        """New buffers for a step like this one, bound to where the state is; those of small steps are kept."""
        layers = state.point.layers
        small = step.ids.shape[1] == 1 or step.is_ragged
        other = next((b.past for b in self._kept if b.present is layers), None)
        if not small:
            present = [np.empty_like(layer) for layer in layers]
        elif self._in_place:
            present = layers
        else:
            present = other or [np.empty_like(layer) for layer in layers]
        binding = Binding(self._ort, self._session, self._inputs, layers, present, step, self._vocab)
        if small:
            self._kept = [*(b for b in self._kept[1 - KEPT :] if b.past is present), binding]
        return binding


class Binding:
    """Inputs and outputs for steps of the same shapes, bound to memory: made once, run many times; see `Output`."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        inputs: list[str],
        past: list[np.ndarray],
        present: list[np.ndarray],
        like: Step,
        vocab: int,
    ) -> None:
        self.past, self.present = past, present
        ids, positions, mask, kept = (np.zeros(array.shape, array.dtype) for array in like.arrays.values())
        mask[...] = 1
        self.step = Step(ids, positions, mask, kept, like.starts.copy(), reused=True)
        shape = kept.shape[::-1] if like.is_ragged else kept.shape
        self.logits, self.tokens = np.empty((*shape, vocab), np.float32), np.empty(shape, np.int64)
        self.io = session.io_binding()
        # The OrtValues share the arrays' memory and must live as long as the binding.
        self._values: list[Any] = []

        def value(array: np.ndarray) -> Any:
            assert array.flags.c_contiguous  # onnxruntime reads the memory, whatever the strides say
            self._values.append(ort.OrtValue.ortvalue_from_numpy(array))
            return self._values[-1]

        for name, array in self.step.feeds(inputs).items():
            self.io.bind_ortvalue_input(name, value(array))
        self.io.bind_ortvalue_output(names.LOGITS, value(self.logits.reshape(*kept.shape, vocab)))
        self.io.bind_ortvalue_output(names.NEXT_TOKENS, value(self.tokens.reshape(kept.shape)))
        for layer, (before, after) in enumerate(zip(past, present, strict=True)):
            source = value(before)
            self.io.bind_ortvalue_input(names.past_state(layer), source)
            target = source if after is before else value(after)
            self.io.bind_ortvalue_output(names.present_state(layer), target)

    def fits(self, layers: list[np.ndarray], shapes: Shapes) -> bool:
        """Whether this binding serves a step of these shapes from these layers."""
        return self.past is layers and self.step.shapes == shapes

    def copy(self, step: Step) -> None:
        """Take the inputs of another step."""
        for ours, theirs in zip(self.step.arrays.values(), step.arrays.values(), strict=True):
            ours[...] = theirs
        self.step.starts[...] = step.starts


def inputs_of(session: Any) -> list[str]:
    """The names of a session's inputs."""
    return [value.name for value in session.get_inputs()]


def load_graph(
    bundle: Bundle, graph: str, source: Path | bytes, *, threads: int | None = None, unpacked: bool = False
) -> Any:
    """onnxruntime's session on the CPU; SessionError if it does not take the graph.

    unpacked: weights that nodes unpack are float32 in memory.
    """
    data = bundle.path if isinstance(source, bytes) else None
    entries = dict([UNPACKED] if unpacked else [])
    try:
        return open_inference(
            source, data=data, operators=bool(GRAPHS[graph].operators), threads=threads, entries=entries
        )
    except SessionError:
        raise
    except Exception as error:  # onnxruntime's errors share no base class
        if is_no_memory(error):
            raise SessionError(
                f"{bundle.path}: too little memory to load it ({first_line(error)}); {MORE}"
            ) from error
        others = [name for name in GRAPHS if GRAPHS[name].onnxruntime < GRAPHS[graph].onnxruntime]
        other = f", or export with --graph {others[0]}" if others else ""
        raise SessionError(
            f"{bundle.graph_file(graph)}: onnxruntime {import_onnxruntime().__version__} cannot load the "
            f"{graph} graph ({first_line(error)}); {upgrade(GRAPHS[graph].onnxruntime)}{other}"
        ) from error


def open_cpu(bundle: Bundle, graph: str, detail: str, device: int, options: Loading) -> CpuSession:
    """The constructor of the provider table."""
    if options.cuda_graph:
        raise SessionError("the CPU has no CUDA graphs; leave --cuda-graph out")
    return CpuSession(bundle, graph, threads=options.threads)
