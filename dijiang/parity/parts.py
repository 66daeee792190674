"""A bundle that runs on the CPU in consecutive parts of its graph, one session at a time.

A session keeps the weights in a layout of its own, in memory: all of them, where one session has the
whole graph. Here a part is loaded, every call goes through it, and it is dropped, as the reference does
with layers. The nodes are the same, and so is every bit of the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..bundle import names
from ..bundle.opened import Bundle
from ..files import temporary_folder
from ..runtime.model import Model
from ..runtime.sessions.base import PIECE
from ..runtime.sessions.cpu import load_graph
from ..runtime.sessions.inference import CPU_PROVIDER, step_of
from ..runtime.state import State
from ..runtime.step import Step
from .cut import Part

#: How onnxruntime calls dimensions that it knows nothing of.
UNNAMED = "unk__"


@dataclass(frozen=True)
class Call:
    """Tokens that go through a model in one step: ids [B, T] int64, T at most PIECE.

    state: of B sequences; the next call with it goes on from there.
    after: takes a copy of the state after the call, one [B, G, K, V] float32 a layer; None: no need.
    real: [B, T] int64, 0 where a token is padding on the left; None: none is, and every token's logits are wanted,
        not the last one's alone.
    """

    ids: np.ndarray
    state: State
    after: list[np.ndarray] | None = None
    real: np.ndarray | None = None


def through(model: Model, calls: Iterable[Call]) -> Iterator[np.ndarray]:
    """Logits [B, T or 1, vocab] float32 of every call, in their order."""
    if isinstance(model, PartedModel):
        yield from model.through(calls)
        return
    for call in calls:
        every = call.real is None
        logits = model.forward(call.ids, call.state, mask=call.real, all_logits=every)
        yield logits if every else logits[:, None]
        if call.after is not None:
            call.after.extend(call.state.clone().layers)


@dataclass(frozen=True)
class Values:
    """What the nodes ahead of a step will read, by name: at first the inputs of a graph.

    Past states are the arrays of a State, and are overwritten by the present ones.
    tokens: of the step.  after: see Call.
    """

    tokens: int
    found: dict[str, np.ndarray]
    after: list[np.ndarray] | None = None

    @classmethod
    def of(cls, step: Step, state: State, after: list[np.ndarray] | None = None) -> Values:
        """The inputs of a step."""
        pasts = {names.past_state(i): layer for i, layer in enumerate(state.layers)}
        return cls(step.ids.shape[1], step.feeds([*names.INPUTS, names.SEQUENCE_STARTS]) | pasts, after)


@dataclass(frozen=True)
class PartedOutput:
    """See Output."""

    logits: np.ndarray
    tokens: np.ndarray


class PartedModel(Model):
    """A bundle as a model in parts; each step of `forward` and `generate` loads all of them."""

    def __init__(self, bundle: Bundle, session: PartedSession) -> None:
        super().__init__(bundle, session)
        self._parted, self.parts = session, session.parts

    def through(self, calls: Iterable[Call]) -> Iterator[np.ndarray]:
        """See `through`: every part is loaded once for all calls."""
        steps = []
        for call in calls:
            self.check(call.ids, call.state, call.real)
            batch, length = call.ids.shape
            here = np.tile(np.arange(length) if call.real is None else [length - 1], (batch, 1))
            step = Step.of(call.ids, call.state.position, here, call.real)
            steps.append(Values.of(step, call.state, call.after))
            call.state.commit(call.state.after(step))
        return (found[names.LOGITS] for found in self._parted.through(steps))


class PartedSession:
    """The Session of a graph that is loaded part by part.

    Args:
        bundle: whose data the graph refers to.
        graph: its name; `model`: the graph, as it is or emulated.
        cut: the graph in parts (`cut.parts`).
        written: whether weights are computed: each part then is written to a temporary folder.
        threads: of a session; None: as many as usable cores.
    """

    longest, rows, ragged, provider = PIECE, None, False, CPU_PROVIDER

    def __init__(
        self,
        bundle: Bundle,
        graph: str,
        model: ir.Model,
        cut: list[Part],
        *,
        written: bool = False,
        threads: int | None = None,
    ) -> None:
        self.graph = graph
        self._bundle, self._model, self._written, self._threads = bundle, model, written, threads
        self.parts = cut
        layers = range(bundle.manifest.spec.num_layers)
        self._past = {names.present_state(i): names.past_state(i) for i in layers}

    def step(self, state: State) -> Step:
        return Step.single(state.batch)

    def run(self, step: Step, state: State) -> PartedOutput:
        found = next(self.through([Values.of(step, state)]))
        state.commit(state.after(step))
        return PartedOutput(found[names.LOGITS], found[names.NEXT_TOKENS])

    def through(self, steps: Sequence[Values]) -> Iterator[dict[str, np.ndarray]]:
        """Logits and tokens of every step, by name."""
        *first, last = self.parts
        for part in first:
            for step, found in zip(steps, self._pass(part, steps), strict=True):
                step.found.update(found)
        yield from self._pass(last, steps)

    def _pass(self, part: Part, steps: Sequence[Values]) -> Iterator[dict[str, np.ndarray]]:
        """What a part makes of every step, states left out; it is in memory until the last one."""
        run = Loaded(part, self._load(part))
        for step in steps:
            with step_of(step.tokens):
                found = run(step.found)
            for present in found.keys() & self._past.keys():
                step.found[self._past[present]][...] = found[present]
            if step.after is not None:
                step.after.extend(result for name, result in found.items() if name in self._past)
            for value in part.last:
                del step.found[str(value.name)]
            yield {name: result for name, result in found.items() if name not in self._past}

    def _load(self, part: Part) -> Any:
        model = extracted(self._model, part)
        if not self._written:
            source = ir.to_proto(model).SerializeToString()
            return load_graph(self._bundle, self.graph, source, threads=self._threads, unpacked=True)
        with temporary_folder() as folder:
            file = folder / "model.onnx"
            ir.save(model, file, external_data="model.onnx.data")
            return load_graph(self._bundle, self.graph, file, threads=self._threads, unpacked=True)


def extracted(model: ir.Model, part: Part) -> ir.Model:
    """A part of a graph as one of its own, over the same weights."""
    return ir.Model(ir.convenience.extract(model.graph, part.inputs, part.outputs), ir_version=model.ir_version)


class Loaded:
    """A part in an onnxruntime session: outputs by name, of inputs by name."""

    def __init__(self, part: Part, session: Any) -> None:
        self._part, self._session, self._declared = part, session, False
        self._inputs, self._outputs = ([str(value.name) for value in v] for v in (part.inputs, part.outputs))

    def __call__(
        self, found: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Run it, with these weights in place of its own; whatever onnxruntime raises."""
        feeds = {name: found[name] for name in self._inputs} | dict(weights or {})
        results = self._session.run(self._outputs, feeds)
        if not self._declared:
            _declare(self._part.outputs, results, self._session.get_outputs())
            self._declared = True
        return dict(zip(self._outputs, results, strict=True))


def _declare(values: Sequence[ir.Value], results: Sequence[np.ndarray], found: Sequence[Any]) -> None:
    """Give values the types and shapes that onnxruntime found, for the parts that read them."""
    for value, result, output in zip(values, results, found, strict=True):
        value.type = ir.TensorType(ir.DataType.from_numpy(result.dtype))
        # A dimension that has no name in the graph gets one in each session; [] is any shape.
        shape = [None if str(n).startswith(UNNAMED) else n for n in output.shape]
        value.shape = ir.Shape(shape) if len(shape) == result.ndim else None
