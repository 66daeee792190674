"""What rounding does to a real model: the vanilla SmolLM2-135M through our passes, on English text.

    python benchmarks/rounding.py WORK_FOLDER -o REPORT.json

llama.cpp's types are judged beside them: the same weights, the same tokens.

There is no DiJiang fine-tune of a real model, and rounding does not ask what stands between the projections.
So the graph is that of `dijiang bench`'s Transformer with real weights: the same writer, passes and schemes
as a bundle. The weights lie on a 4-bit grid of their own (Q4_1). For the cases in 4 bits noise of one step
breaks it, or a scheme that hits the grid would look free of loss. Exit 75: PyPI cannot be reached.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import llama
import numpy as np
import onnx_ir as ir
import torch
from real import PACKAGE, english, fetch, run
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from dijiang.bench.transformer import VanillaModel, transformer_graph
from dijiang.bundle import names
from dijiang.graph.passes.linear import linears
from dijiang.graph.reads import parameter_reads
from dijiang.graph.schemes import Rounder
from dijiang.graph.schemes.nbits import calibrated
from dijiang.machine.describe import describe_cpu
from dijiang.machine.limits import usable_cores
from dijiang.models.load import DijiangModel, load_checkpoint
from dijiang.recipe import Blocks, Recipe, resolve
from dijiang.runtime.sessions.inference import open_inference

WINDOW = 512
#: Tokens of text that second moments come from; they lie behind those that are judged.
CALIBRATION = 6144
#: Token ids [T] -> logits [T, vocab] float32 of a model.
Logits = Callable[[np.ndarray], np.ndarray]
#: Input channels of Q4_1 that share a step.
GRID = 32


def broken(vanilla: Path, folder: Path) -> Path:
    """The checkpoint with uniform noise of one Q4_1 step on every matrix, seed 0; made once."""
    if folder.exists():
        return folder
    shutil.copytree(vanilla, folder)
    tensors, random = load_file(vanilla / "model.safetensors"), np.random.default_rng(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            blocks = tensor.reshape(-1, GRID)
            step = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / 15
            noise = step * (random.random(blocks.shape, np.float32) - np.float32(0.5))
            tensors[name] = (blocks + noise).reshape(tensor.shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


class Vanilla:
    """The vanilla model of a converted checkpoint, its weights stored as a recipe says."""

    def __init__(self, model: DijiangModel, recipe: Recipe, folder: Path, rounder: Rounder | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        source = VanillaModel(model.spec, model.weights, WINDOW)
        graph = transformer_graph(source, recipe, "fp32", tied=model.spec.tied_embeddings, rounder=rounder)
        self.inputs: dict[str, str] = {}
        if recipe.body is None:  # the inputs of all linears, to calibrate by
            for linear in linears(graph.graph):
                self.inputs[str(linear.weight.name)] = str(linear.input.name)
            for value in {linear.input for linear in linears(graph.graph)}:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                graph.graph.outputs.append(value)
        self.bytes = sum(parameter_reads(graph).values())
        ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")
        self._session = open_inference(folder / "model.onnx")
        shape = (1, model.spec.num_kv_heads, WINDOW, model.spec.head_size)
        self._caches = {
            value.name: np.zeros(shape, np.float32)
            for value in self._session.get_inputs()
            if value.type == "tensor(float)"
        }

    def run(self, ids: np.ndarray, outputs: tuple[str, ...] = (names.LOGITS,)) -> list[np.ndarray]:
        """Outputs for ids [T] from the first position on; logits [1, T, vocab] of every token."""
        feeds = tokens_of(ids[None])
        known = {value.name for value in self._session.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in known}
        found: list[np.ndarray] = self._session.run(list(outputs), feeds | self._caches)
        return found

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Logits`."""
        found: np.ndarray = self.run(ids)[0][0]
        return found

    def moments(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Second moments [in, in] of the inputs of every linear."""
        wanted, found = tuple(dict.fromkeys(self.inputs.values())), {}
        for window in windows(ids):
            for name, x in zip(wanted, self.run(window, wanted), strict=True):
                rows = x.reshape(-1, x.shape[-1])
                found[name] = found.get(name, 0) + rows.T @ rows
        return {weight: found[name] for weight, name in self.inputs.items()}


def tokens_of(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a Transformer's graph for ids [N, T] from the first position on, but for its caches."""
    count, length = ids.shape
    every = np.broadcast_to(np.arange(length), ids.shape)
    return {
        names.INPUT_IDS: ids,
        names.POSITION_IDS: every,
        names.LOGIT_INDICES: every,
        names.LAST_POSITION: np.full(count, length - 1, np.int32),
        names.TOTAL_LENGTH: np.array(length, np.int32),
    }


class LlamaCpp:
    """The same weights in a type of llama.cpp, see `Vanilla`. bytes: of all tensors."""

    def __init__(self, checkpoint: Path, kind: str, cache: Path, vocab: int) -> None:
        import gguf

        self._shape = (WINDOW, vocab)
        file = llama.quantized(cache, llama.convert(checkpoint, cache), kind)
        self.bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
        command = [str(llama.logits_tool(cache)), str(file), str(WINDOW), str(usable_cores())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Logits`: of a window."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(ids.astype(np.int32).tobytes())
        stdin.flush()
        return np.frombuffer(stdout.read(4 * math.prod(self._shape)), np.float32).reshape(self._shape)


def windows(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Whole windows of token ids."""
    return iter(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW))


@dataclass(frozen=True)
class Case:
    """A way of rounding the projections; the head in 8 bits. calibrated: by GPTQ, else to nearest values.

    scale_bytes: see `Blocks`.
    """

    bits: int
    block: int
    rotation: int
    calibrated: bool
    scale_bytes: int = 4

    @property
    def name(self) -> str:
        parts = [
            f"int{self.bits}",
            f"blocks of {self.block}",
            f"rotated by {self.rotation}" if self.rotation else "not rotated",
            "GPTQ" if self.calibrated else "nearest",
            *(["bfloat16 scales"] if self.scale_bytes == 2 else []),
        ]
        return ", ".join(parts)

    @property
    def recipe(self) -> Recipe:
        """In the ort graph, which every machine runs."""
        blocks = Blocks(self.bits, self.block, self.rotation, self.scale_bytes)
        head = replace(blocks, bits=8, block=self.block if self.bits == 8 else 64)
        return replace(
            resolve(f"int{self.bits}", graph="ort"), body=blocks, head=head, embed=replace(head, rotation=0)
        )


#: Bits of our cases -> types of llama.cpp that are judged beside them, by the names of their rows.
LLAMA_CPP = {
    8: {"llama.cpp, Q8_0": "q8_0"},
    4: {"llama.cpp, Q4_0": "q4_0", "llama.cpp, Q4_K_M": "q4_k_m"},
}
CASES = [
    Case(8, 128, 0, False),  # what was the default before
    Case(8, 64, 0, False),
    Case(8, 32, 0, False),
    Case(8, 128, 64, False),
    Case(8, 64, 64, False),
    Case(8, 32, 64, False),
    Case(8, 64, 0, True),
    Case(8, 64, 64, True),
    Case(8, 64, 64, True, 2),  # the default
    Case(4, 32, 0, False),
    Case(4, 128, 0, True),  # what was the default before
    Case(4, 64, 64, True),
    Case(4, 64, 64, True, 2),  # the default
    Case(4, 32, 64, True),
    Case(4, 32, 64, True, 2),
    Case(4, 128, 64, True),
]


def command(function: Callable[..., None]) -> click.Command:
    """A command (WORK, output, tokens, go_on): where files are kept, the report, and how much is judged."""
    for option in (
        click.option("--go-on", is_flag=True, help="Measure no row again that the report has."),
        click.option("--tokens", default=20_480, show_default=True, help="That are judged."),
        click.option("-o", "--output", type=click.Path(path_type=Path), required=True),
        click.argument("work", type=click.Path(path_type=Path)),
    ):
        function = option(function)
    return click.command()(function)


def rows_of(output: Path, name: str, *, go_on: bool) -> list[dict[str, Any]]:
    """The rows that a report has already."""
    if not (go_on and output.exists()):
        return []
    rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))[name]
    return rows


@command
def main(work: Path, output: Path, tokens: int, go_on: bool) -> None:
    """Measure every case in WORK, and write what was found."""
    work.mkdir(parents=True, exist_ok=True)
    vanilla, text = fetch(work), english(work).read_text(encoding="utf-8")
    ids = np.array(Tokenizer.from_file(str(vanilla / "tokenizer.json")).encode(text).ids)
    judged, left = ids[:tokens], ids[tokens : tokens + CALIBRATION]
    found = {str(row["case"]): row for row in rows_of(output, "cases", go_on=go_on)}
    for bits, folder in ((8, vanilla), (4, broken(vanilla, work / "broken"))):
        converted = work / f"{folder.name}-converted"
        if not converted.exists():
            run("convert", folder, "-o", converted)
        cases = [case for case in CASES if case.bits == bits and case.name not in found]
        peers = {name: kind for name, kind in LLAMA_CPP[bits].items() if name not in found}
        if cases or peers:
            rows = measure(folder, converted, cases, peers, judged, left, work)
            found |= {str(row["case"]): row for row in rows}
    names = [
        name for bits, peers in LLAMA_CPP.items() for name in (*(c.name for c in CASES if c.bits == bits), *peers)
    ]
    report = {
        "package": PACKAGE,
        "cpu": describe_cpu(Path("/")),
        "tokens": len(judged) // WINDOW * WINDOW,
        "calibration": len(left) // WINDOW * WINDOW,
        "cases": [found[name] for name in names],
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(
    vanilla: Path,
    checkpoint: Path,
    cases: list[Case],
    peers: dict[str, str],
    judged: np.ndarray,
    left: np.ndarray,
    work: Path,
) -> list[dict[str, Any]]:
    """A row for each case of one checkpoint, and for each type of llama.cpp."""
    model = load_checkpoint(checkpoint)
    exact = Vanilla(model, resolve("fp32", graph="ort"), work / "rounding" / "exact")
    moments = exact.moments(left)
    graphs: dict[str, tuple[Vanilla | LlamaCpp, float]] = {}
    for case in cases:
        own = calibrated(lambda name: moments[name].copy()) if case.calibrated else None
        start = time.perf_counter()
        graph = Vanilla(model, case.recipe, work / "rounding" / case.name, own)
        graphs[case.name] = graph, time.perf_counter() - start
    for name, kind in peers.items():
        start = time.perf_counter()
        peer = LlamaCpp(vanilla, kind, work / "llama.cpp", model.spec.vocab_size)
        graphs[name] = peer, time.perf_counter() - start
    costs = judge(exact.logits, [graph.logits for graph, _ in graphs.values()], judged)
    return [
        {"case": name, "bytes": graph.bytes, "seconds": took} | cost
        for (name, (graph, took)), cost in zip(graphs.items(), costs, strict=True)
    ]


def judge(exact: Logits, others: list[Logits], judged: np.ndarray) -> list[dict[str, float]]:
    """What each of some models costs against the exact one, on whole windows of token ids."""
    sums, count = np.zeros((len(others), 4)), len(judged) // WINDOW
    for window in windows(judged):
        expected = log_softmax(exact(window))
        for found, logits in zip(sums, others, strict=True):
            found += compared(expected, log_softmax(logits(window)), window)
    return [
        {
            "perplexity": float(np.exp(loss / (count * (WINDOW - 1)))),
            "perplexity_change": float(np.expm1((loss - exact_loss) / (count * (WINDOW - 1)))),
            "kl": kl / (count * WINDOW),
            "top1_agreement": agreed / (count * WINDOW),
        }
        for agreed, kl, loss, exact_loss in sums
    ]


def log_softmax(logits: np.ndarray) -> torch.Tensor:
    """Log-probabilities [T, vocab] float32: their rounding is a thousandth of what is measured."""
    return torch.log_softmax(torch.from_numpy(logits), -1)


def compared(expected: torch.Tensor, found: torch.Tensor, ids: np.ndarray) -> list[float]:
    """Of one window: tokens with the same most likely next one, sum of KL, and both sums of the losses."""
    following = torch.from_numpy(ids[1:, None])
    kl = (expected.exp() * (expected - found)).sum(-1).double().sum()
    agreed = (expected.argmax(-1) == found.argmax(-1)).sum()
    losses = [-side[:-1].gather(1, following).double().sum() for side in (found, expected)]
    return [float(value) for value in (agreed, kl, *losses)]


if __name__ == "__main__":
    main()
