"""What an export will need: known, and checked, before it starts."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import psutil

from ..errors import ExportError
from ..models.load import DijiangModel

#: What a bundle needs on disk beside its weights: graph, tokenizer, tables.
SPARE_BYTES = 1 << 20
#: Memory of the process before any weight is read: Python, NumPy, onnx, onnxruntime.
BASE_BYTES = 150 << 20
#: Bytes for each number of a layer, and of the embedding, while it is written: as read, in float32 and
#: as rounded. Projections of one input become one tensor, at most a whole layer.
LAYER_BYTES, EMBEDDING_BYTES = 10, 16
#: Seconds to write a thousand million weights on 2 cores. fp32: 8 to 13 s were measured for Pythia-410M;
#: the others are guesses from their kind of work. They inform, and refuse nothing.
SECONDS = {"fp32": 25.0, "fp16": 30.0, "bf16": 30.0, "int8": 40.0, "int4": 100.0}


@dataclass(frozen=True)
class Plan:
    """Needs of an export. disk, memory: bytes; memory is the peak, file pages not counted.

    seconds: about, to write the bundle.
    """

    disk: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        return f"{_size(self.disk)}, {_size(self.memory)} memory, about {self.seconds:,.0f} s"

    def require(self, folder: Path) -> None:
        """ExportError if the disk of `folder` or the memory of this machine does not suffice."""
        disk, memory = shutil.disk_usage(folder).free, psutil.virtual_memory().available
        if self.disk > disk:
            raise ExportError(
                f"{folder.parent}: the bundle needs {_size(self.disk)}, {_size(disk)} are free; "
                "free some space or choose another disk"
            )
        if self.memory > memory:
            raise ExportError(
                f"the export needs {_size(self.memory)} of memory, {_size(memory)} are available; "
                "close something, or verify on another machine: --no-verify"
            )


def plan_export(model: DijiangModel, graph: ir.Model, precision: str, *, verify: bool) -> Plan:
    """The needs of writing a graph, and of comparing it with its checkpoint.

    Args:
        graph: as it will be written.
        verify: whether the bundle will be compared, too.
    """
    disk = weight_bytes(graph)
    embedding = math.prod(model.weights.shape("embed.weight"))
    memory = max(LAYER_BYTES * model.layer_parameters, EMBEDDING_BYTES * embedding)
    if verify:
        # First a session, which has the weights in a layout of its own; then the reference with one
        # layer, or the head and a window's logits, in float64.
        memory = max(memory, disk, 8 * (model.layer_parameters + 2 * embedding))
    return Plan(disk + SPARE_BYTES, memory + BASE_BYTES, SECONDS[precision] * model.parameters / 1e9)


def weight_bytes(graph: ir.Model) -> int:
    """Bytes of all stored tensors of a graph."""
    return sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
