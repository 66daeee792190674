"""What an export will need: known, and checked, before it starts."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..errors import ExportError
from ..machine.limits import available_bytes
from ..models.load import DijiangModel
from ..parity.cut import Part, parts
from ..parity.emulation import emulate
from ..parity.verify import FEWEST, default_slice
from ..recipe import PRECISIONS, Recipe
from .calibration import LENGTH, TOGETHER, batch_of
from .pipeline import drawing
from .save import data_bytes

#: What a bundle needs on disk beside its weights: graph, tokenizer, tables.
SPARE_BYTES = 1 << 20
#: Memory of the process before any weight is read: Python, NumPy, onnx, onnxruntime.
BASE_BYTES = 150 << 20
#: Bytes for each number of a layer, and of the embedding, while it is written: as read, in float32 and
#: as rounded. Projections of one input become one tensor, at most a whole layer.
LAYER_BYTES, EMBEDDING_BYTES = 10, 16
#: Tensors computed and written at once, where that takes no more memory than this. Rounding to integers
#: is itself the work of all cores.
WRITERS, WRITING_BYTES = 2, 2 << 30
#: Bytes for each number of a second moment: as it waits for its layer, and as GPTQ works on it: mixed, with a
#: copy in reverse and the factor. Those of two layers wait at most.
MOMENT_BYTES, GPTQ_BYTES, WAITING = 4, 16, 2
#: Bytes for each number of a layer in a session: as it is read, and as the session packs it.
RUNNING_BYTES = 8
#: What a session has of the weights that draw text, while it packs them.
SESSION_COPIES = 2
#: Bytes for each drawn logit: of float32, with float64 noise, and their sum.
DRAWN_BYTES = 24
#: Bytes for each logit compared: the bundle's, as it comes and as it is kept, and a float64 window.
COMPARED_BYTES = 16
#: Numbers of working memory for each token of a prefill piece, in channels of the widest matmul.
ACTIVATIONS = 8
#: Seconds to draw 10^12 parameters x tokens and round by them (Pythia-70M: 53), and to verify 10^9
#: parameters (OPT-350M: 40; LLaMA2-7B, on busy cores: 50; the twin takes half as long again).
CALIBRATION_SECONDS, VERIFY_SECONDS = 53.0, 60.0
#: Seconds to load 10^9 bytes of integer weights and run one token (LLaMA2-7B in int4: 7.3 for 4.0 GB): a
#: bundle in parts does it for every token that it draws.
LOAD_SECONDS = 1.8


@dataclass(frozen=True)
class Plan:
    """Needs of an export.

    disk: bytes of the output folder.  temporary: bytes of the system's folder for temporary files.
    memory: bytes at the peak, an upper bound; file pages not counted.  seconds: about.
    writers: tensors that are computed and written at once.
    """

    disk: int
    temporary: int
    memory: int
    seconds: float
    writers: int = 1

    def __str__(self) -> str:
        return f"{_size(self.disk)}, {_size(self.memory)} memory, about {self.seconds:,.0f} s"

    def require(self, folder: Path) -> None:
        """ExportError if the disk of `folder` or the memory of this machine does not suffice."""
        needs, other = {folder: self.disk}, Path(tempfile.gettempdir())
        if _device(other) == _device(folder):
            needs[folder] += self.temporary
        else:
            needs[other] = self.temporary
        for place, need in needs.items():
            free = shutil.disk_usage(place).free
            if need > free:
                name = folder.parent if place == folder else place
                raise ExportError(
                    f"{name}: the export needs {_size(need)}, {_size(free)} are free; "
                    "free some space or choose another disk"
                )
        memory = available_bytes()
        if self.memory > memory:
            raise ExportError(
                f"the export needs {_size(self.memory)} of memory, {_size(memory)} are available; "
                "close something, or leave out what needs it: --no-verify, --calibration-tokens 0"
            )


def plan_export(
    model: DijiangModel, graphs: Mapping[str, ir.Model], recipe: Recipe, *, verify: bool, text: bool = False
) -> Plan:
    """The needs of writing graphs, and of comparing them with their checkpoint.

    Args:
        graphs: as they will be written.
        verify: whether the bundle will be compared, too.
        text: whether it will be compared on a file.
    """
    disk = data_bytes(graphs) if recipe.budget is None else recipe.budget.bytes
    parameters, tokens = model.parameters, recipe.calibration_tokens or 0
    first = next(iter(graphs.values()))
    embedding = math.prod(model.weights.shape("embed.weight"))
    calibrated = _calibration_files(model, recipe, embedding) if tokens else 0
    written = max(LAYER_BYTES * model.layer_parameters, EMBEDDING_BYTES * embedding)
    writers = WRITERS if not recipe.in_blocks and WRITERS * written <= WRITING_BYTES else 1
    memory = writers * written
    seconds = PRECISIONS[recipe.precision].seconds * parameters / 1e9
    if tokens:
        memory = max(memory, _calibration_bytes(model, first, tokens, measured=recipe.budget is not None))
        seconds += CALIBRATION_SECONDS * parameters * tokens / 1e12
    emulated = 0
    if verify:
        loaded: list[Part] = []
        for copy in [graph.clone() for graph in graphs.values()]:
            changed, cut = emulate(copy), parts(copy.graph)
            emulated = max([emulated, *(part.stored for part in cut if changed)])
            loaded += cut
        session = max(part.nbytes for part in loaded)
        memory = max(memory, _verify_bytes(model, session, len(graphs), text=text))
        seconds += VERIFY_SECONDS * parameters / 1e9
        if len(loaded) > len(graphs) and recipe.in_blocks and not text:
            seconds += LOAD_SECONDS * disk * (FEWEST - 1) / 1e9
    return Plan(disk + SPARE_BYTES, max(emulated, calibrated), memory + BASE_BYTES, seconds, writers)


def _calibration_files(model: DijiangModel, recipe: Recipe, embedding: int) -> int:
    """The model that draws text; then a layer, the first with the embedding, beside what a budget rounded."""
    widths = () if recipe.budget is None or recipe.body is None else (recipe.budget.blocks, recipe.body)
    rounded = sum(blocks.weight_bytes for blocks in widths) * model.parameters
    return math.ceil(max(_drawn_bytes(model), 4 * (embedding + model.layer_parameters) + rounded))


def _drawn_bytes(model: DijiangModel) -> float:
    """Of all weights, and of the embedding, which is in float32."""
    embedding = math.prod(model.weights.shape("embed.weight"))
    return PRECISIONS[drawing().precision].weight_bytes * model.parameters + 4 * embedding


def _calibration_bytes(model: DijiangModel, graph: ir.Model, tokens: int, *, measured: bool) -> int:
    """The model with a batch of sequences that it draws; or a layer, run and rounded; or the head, the last.

    Beside the last two there is what crosses from layer to layer, with the ids.

    Args:
        measured: whether changes are: the layer that ran last then stays in its session.
    """
    spec, widths = model.spec, [n.attributes["K"].as_int() for n in graph.graph if "K" in n.attributes]
    batch = batch_of(tokens) * (2 * spec.state_bytes + DRAWN_BYTES * spec.vocab_size)
    drawn = math.ceil(SESSION_COPIES * _drawn_bytes(model)) + batch
    moments = WAITING * MOMENT_BYTES * sum(width**2 for width in widths) // spec.num_layers
    running = 4 * ACTIVATIONS * min(tokens, TOGETHER * LENGTH) * max(widths)
    session = RUNNING_BYTES * model.layer_parameters
    layer = LAYER_BYTES * model.layer_parameters + GPTQ_BYTES * max(widths) ** 2
    head = EMBEDDING_BYTES * spec.vocab_size * spec.hidden_size + GPTQ_BYTES * spec.hidden_size**2
    crossing = tokens * (4 * spec.hidden_size + np.dtype(np.int64).itemsize)
    kept = session if measured else 0
    return max(drawn, max(moments + max(session + running, layer), head) + kept + crossing)


def _verify_bytes(model: DijiangModel, session: int, graphs: int, *, text: bool) -> int:
    """First a session of the largest part, in a layout of its own; then the float64 reference, and its twin.

    The reference has a layer, or the head and what it was made from, beside the logits; the twin keeps its head.
    """
    vocab, layer = model.spec.vocab_size, model.layer_parameters
    embedding = math.prod(model.weights.shape("embed.weight"))
    tokens, window = default_slice(model, text=text)
    widest = layer // model.spec.hidden_size
    working = 12 * ACTIVATIONS * tokens * widest
    compared = 4 * graphs * tokens * vocab + COMPARED_BYTES * window * vocab
    return compared + working + max(session, 4 * embedding + 12 * max(layer, embedding))


def _device(place: Path) -> object:
    """What tells one disk from another."""
    return place.stat().st_dev


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
