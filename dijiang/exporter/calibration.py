"""What the inputs of each projection look like, on a text.

GPTQ (arXiv 2210.17323) rounds a weight so that its *output* changes least; for that it needs the second
moment of the projection's input, [in, in]. No text has to be found: the float32 model can draw its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..bundle import names
from ..files import temporary_folder
from ..graph.passes.linear import linears
from ..graph.schemes import Moments
from ..progress import Progress, silent
from ..runtime.sessions.inference import open_inference
from .save import save_model

#: Tokens of a drawn sequence, and sequences drawn side by side.
LENGTH, BATCH = 256, 64
#: Largest number of tokens drawn, and the parameters times tokens that are worth an export's time.
TOKENS, WORK = 16_384, 2e12
#: Fewer tokens than this tell too little.
LEAST = 4_096


def default_tokens(parameters: int) -> int:
    """Tokens to calibrate on; 0 where the model is so large that it would take too long."""
    affordable = int(min(TOKENS, WORK / parameters))
    return affordable if affordable >= LEAST else 0


def batch_of(tokens: int) -> int:
    """Sequences that are drawn side by side."""
    return max(1, min(BATCH, tokens // LENGTH))


def second_moments(
    graph: ir.Model,
    tokens: int,
    limit: int | None,
    vocab: int,
    text: np.ndarray | None = None,
    progress: Progress = silent,
) -> Moments:
    """Second moments [in, in] float32 of the inputs of every linear, by the name of its weight.

    Args:
        graph: float32 step graph; its outputs are extended.
        tokens: to draw, in sequences of LENGTH.
        limit: positions the model has; None: no end.
        vocab: number of token ids.
        text: int64 [tokens] to take instead of drawn ones.

    The float32 model is in memory meanwhile: 4 bytes a parameter, and 4 in^2 bytes a linear.
    """
    inputs = {str(linear.weight.name): linear.input for linear in linears(graph.graph)}
    for value in set(inputs.values()) - set(graph.graph.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.graph.outputs.append(value)
    with temporary_folder() as folder:
        model = _Float32(graph, folder)
        length = min(LENGTH, limit or LENGTH)
        batch = batch_of(tokens)
        moments: Moments = {}
        rounds = max(1, round((tokens if text is None else len(text)) / (batch * length)))
        for seed in range(rounds):
            if text is None:
                rows = list(_draw(model, batch, length, vocab, np.random.default_rng(seed)))
            else:
                part = text[seed * batch * length :][: batch * length]
                rows = [part[start : start + length] for start in range(0, len(part), length)]
            for row in rows:
                _add(moments, model, row[None], inputs)
            progress("calibrate", seed + 1, rounds)
    return moments


class _Float32:
    """The float32 graph in a session of its own, fed and read by name."""

    def __init__(self, graph: ir.Model, folder: Path) -> None:
        save_model(graph, folder / "model.onnx", "model.onnx.data")
        self._session = open_inference(folder / "model.onnx")
        self._states = {i.name: i.shape for i in self._session.get_inputs() if "recurrent_state" in i.name}
        self.next_states = [names.present_state(layer) for layer in range(len(self._states))]

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """The states before the first token, by input name."""
        return {name: np.zeros((batch, *shape[1:]), np.float32) for name, shape in self._states.items()}

    def run(
        self, outputs: list[str], ids: np.ndarray, start: int, state: dict[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Outputs by name for ids [B, T] at positions from `start`; logits of the last one."""
        positions = np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape)
        last = np.full((len(ids), 1), ids.shape[1] - 1)
        feeds = {
            names.INPUT_IDS: ids,
            names.POSITION_IDS: positions,
            names.ATTENTION_MASK: np.ones_like(ids),
            names.LOGIT_INDICES: last,
        }
        results: list[np.ndarray] = self._session.run(outputs, feeds | state)
        return results


def _draw(model: _Float32, batch: int, length: int, vocab: int, random: np.random.Generator) -> np.ndarray:
    """Sequences [batch, length] drawn from the model, each from a random first token."""
    ids = np.empty((batch, length), np.int64)
    ids[:, 0] = random.integers(0, vocab, batch)
    state = model.empty(batch)
    for t in range(length - 1):
        logits, *new = model.run([names.LOGITS, *model.next_states], ids[:, t : t + 1], t, state)
        state = dict(zip(state, new, strict=True))
        # The largest of logits + Gumbel noise is a draw from their softmax.
        ids[:, t + 1] = (logits[:, 0] + random.gumbel(size=(batch, vocab))).argmax(-1)
    return ids


def _add(moments: Moments, model: _Float32, ids: np.ndarray, inputs: dict[str, ir.Value]) -> None:
    found = model.run([str(value.name) for value in inputs.values()], ids, 0, model.empty(len(ids)))
    for name, x in zip(inputs, found, strict=True):
        rows = x.reshape(-1, x.shape[-1])
        square = rows.T @ rows
        moments[name] = moments[name] + square if name in moments else square
