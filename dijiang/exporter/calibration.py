"""What the inputs of each projection look like, on a text.

GPTQ (arXiv 2210.17323) rounds a weight so that its *output* changes least; for that it needs the second
moment of the projection's input, [in, in]. No text has to be found: the model can draw its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from scipy.linalg import blas

from ..errors import ExportError
from ..files import temporary_folder
from ..graph.passes.linear import linears
from ..graph.roles import ROUNDED
from ..parity.cut import Part, parts
from ..parity.parts import Loaded, extracted
from ..progress import Progress, silent
from ..recipe import Graph
from ..runtime.sessions.cpu import Binding, inputs_of
from ..runtime.sessions.inference import import_onnxruntime, open_inference, step_of
from ..runtime.step import Step
from .save import save_model

#: Tokens of a sequence, sequences drawn side by side, and sequences that go through a layer at once.
LENGTH, BATCH, TOGETHER = 256, 64, 8
#: Largest number of tokens drawn, and the parameters times tokens that are worth an export's time.
TOKENS, WORK = 16_384, 2e12
#: Fewer tokens than this tell too little.
LEAST = 4_096
TINY = np.finfo(np.float32).tiny
#: Rows that are copied from columns at once: they stay in the processor's cache.
STRIP = 64


def default_tokens(parameters: int) -> int:
    """Tokens to calibrate on; 0 where the model is so large that it would take too long."""
    affordable = int(min(TOKENS, WORK / parameters))
    return affordable if affordable >= LEAST else 0


def batch_of(tokens: int) -> int:
    """Sequences that are drawn side by side."""
    return max(1, min(BATCH, tokens // LENGTH))


def batches_of(ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Token ids [tokens] of a text as sequences: [N, length] int64 each; a shorter rest is left out."""
    if len(ids) < length:
        return [ids[None]]
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    return [whole[start : start + TOGETHER] for start in range(0, len(whole), TOGETHER)]


def draw(
    graph: ir.Model, row: Graph, tokens: int, length: int, vocab: int, progress: Progress = silent
) -> list[np.ndarray]:
    """Sequences that a step graph of a form draws, each from a random first token; see `batches_of`.

    The whole graph is in memory meanwhile.
    """
    with temporary_folder() as folder:
        save_model(graph, folder / "model.onnx", "model.onnx.data")
        session = open_inference(folder / "model.onnx", operators=bool(row.operators))
        batch = batch_of(tokens)
        rounds = max(1, -(-tokens // (batch * length)))
        drawn = np.empty((rounds, batch, length), np.int64)
        for seed, ids in enumerate(drawn):
            _draw(session, ids, vocab, np.random.default_rng(seed), in_place=row.in_place)
            progress("draw text", seed + 1, rounds)
    return batches_of(drawn.ravel()[: max(tokens, 1)], length)


def _draw(session: Any, ids: np.ndarray, vocab: int, random: np.random.Generator, *, in_place: bool) -> None:
    """Fill ids [B, T] with what the model draws."""
    batch, length = ids.shape
    ids[:, 0] = random.integers(0, vocab, batch)
    past = list(_empty(session.get_inputs(), batch).values())
    present, single = past if in_place else [np.empty_like(layer) for layer in past], Step.single(batch)
    ort, inputs = import_onnxruntime(), inputs_of(session)
    there = Binding(ort, session, inputs, past, present, single, vocab)
    back = Binding(ort, session, inputs, present, past, single, vocab)
    for t in range(length - 1):
        binding = back if t % 2 else there
        binding.copy(Step.of(ids[:, t : t + 1], np.full(batch, t), single.kept))
        with step_of(1):
            session.run_with_iobinding(binding.io)
        # The largest of logits + Gumbel noise is a draw from their softmax.
        noise = np.log(random.standard_exponential((batch, vocab), np.float32) + TINY)
        ids[:, t + 1] = (binding.logits[:, 0] - noise).argmax(-1)


def _empty(inputs: Iterable[Any], batch: int) -> dict[str, np.ndarray]:
    """The states before the first token, by the name of the input, in the order of the layers."""
    states = [value for value in inputs if "recurrent_state" in value.name]
    return {value.name: np.zeros((batch, *value.shape[1:]), np.float32) for value in states}


def feeds_of(graph: ir.Model, batches: Iterable[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Inputs of a step graph, by name, for sequences [N, T] int64 each from their first token on."""
    feeds = []
    for ids in batches:
        every = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        step = Step.of(ids, np.zeros(len(ids), np.int64), every)
        inputs = [str(value.name) for value in graph.graph.inputs]
        feeds.append(step.feeds(inputs) | _empty(graph.graph.inputs, len(ids)))
    return feeds


class LayerMoments:
    """See `graph.schemes.Moments`: of one layer at a time.

    All sequences go through a layer together, then the next one is loaded. What is in memory is one
    layer, the moments of two, and what crosses from layer to layer, [tokens, hidden].
    """

    def __init__(
        self, graph: ir.Model, sequences: Iterable[dict[str, np.ndarray]], *, replaceable: bool = False
    ) -> None:
        """graph: in float32; its outputs are replaced.  sequences: its inputs by name, see `feeds_of`.

        replaceable: `change` will be asked. The last layer then stays in memory.
        """
        self._inputs = {str(x.weight.name): x.input for x in linears(graph.graph) if x.role in ROUNDED}
        self._uses = Counter(str(value.name) for value in self._inputs.values())
        for value in set(self._inputs.values()):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.graph.outputs[:] = list(dict.fromkeys(self._inputs.values()))
        self._graph, cut = graph, parts(graph.graph, bound=0)
        self._left, self._crossing = iter(cut), {str(value.name) for part in cut for value in part.inputs}
        self._halves: dict[str, np.ndarray] = {}  # upper triangles; 0 below
        self._replaceable, self._layer = replaceable, _Layer()
        self._found = [dict(found) for found in sequences]

    def __call__(self, name: str) -> np.ndarray:
        """The second moment [in, in] float32 of the inputs of a linear, by the name of its weight.

        Raises:
            ExportError: it holds NaN or infinity.
        """
        value = str(self._inputs[name].name)
        while value not in self._halves:
            self._advance(next(self._left))
        self._uses[value] -= 1
        half = self._halves[value] if self._uses[value] else self._halves.pop(value)
        if not np.isfinite(half).all():
            raise ExportError(
                f"{name}: on the calibration text its inputs are beyond float32; give another text with "
                "--calibration-text, or use --calibration-tokens 0"
            )
        whole: np.ndarray = half.T  # in place: rows in their order, zeros above the diagonal
        for start in range(0, len(whole), STRIP):
            strip, behind = slice(start, start + STRIP), slice(start + STRIP, None)
            whole[strip, behind] = whole[behind, strip].T
            whole[strip, strip] = np.tril(whole[strip, strip]) + np.tril(whole[strip, strip], -1).T
        return whole

    def change(self, name: str, weight: np.ndarray) -> float:
        """How far another weight [in, out] float32 in the place of a linear's moves what its layer passes on.

        The layer is the last one that moments were asked of. Of each token of the first sequences
        it is |new - old|^2 / |old|^2, and their mean; of several values that are passed on, the largest.
        """
        while name not in self._layer.weights:
            self._advance(next(self._left))
        return self._layer.change({name: weight})

    def _advance(self, part: Part) -> None:
        """All sequences through the next part."""
        model, first = extracted(self._graph, part), self._found[0]
        own = {name: value for name, value in model.graph.initializers.items() if name in self._inputs}
        if self._replaceable:
            model.graph.inputs.extend(own.values())  # what is given for an input goes before what is stored
        with temporary_folder() as folder:
            save_model(model, folder / "model.onnx", "model.onnx.data")
            run = Loaded(part, open_inference(folder / "model.onnx"))
            layer = _Layer(run, set(own), dict(first), {})
            for found in self._found:
                with step_of(LENGTH):
                    made = run(found)
                for name in made.keys() & self._uses.keys():
                    rows = made[name].reshape(-1, made[name].shape[-1])
                    sums = {"beta": 1, "c": self._halves[name]} if name in self._halves else {}
                    self._halves[name] = blas.ssyrk(1, rows.T, overwrite_c=True, **sums)
                for value in part.last:
                    del found[str(value.name)]
                passed = {name: made[name] for name in made.keys() & self._crossing}
                if found is first:
                    layer.after.update(passed)
                found.update(passed)
        if self._replaceable:
            self._layer = layer


@dataclass(frozen=True)
class _Layer:
    """A part that all sequences went through.

    weights: names of those that another can be given for.  before, after: what the first sequences brought,
    and what was passed on of them.
    """

    run: Loaded | None = None
    weights: set[str] = field(default_factory=set)
    before: dict[str, np.ndarray] = field(default_factory=dict)
    after: dict[str, np.ndarray] = field(default_factory=dict)

    def change(self, weights: dict[str, np.ndarray]) -> float:
        assert self.run is not None
        with step_of(LENGTH):
            made = self.run(self.before, weights)
        moved = [_moved(old, made[name]) for name, old in self.after.items() if _has_channels(old)]
        return max(moved, default=0.0)


def _has_channels(value: np.ndarray) -> bool:
    return value.ndim > 1 and np.issubdtype(value.dtype, np.floating)


@np.errstate(over="ignore", invalid="ignore")  # what is beyond float32 is refused when its moment is asked for
def _moved(old: np.ndarray, new: np.ndarray) -> float:
    """Mean over tokens of |new - old|^2 / |old|^2, of [..., channels]."""
    length = np.square(old).sum(-1)
    return float((np.square(new - old).sum(-1) / np.maximum(length, TINY)).mean())
