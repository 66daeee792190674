"""What benchmarks/gpu.py measures; each case returns JSON with its raw samples."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable
from ctypes import c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dijiang
from dijiang.bench.subject import bundle_traffic
from dijiang.bundle.manifest import open_bundle
from dijiang.machine.driver import Cuda
from dijiang.models.initial import write_random
from dijiang.models.presets import PRESETS
from dijiang.parity.verify import verify
from dijiang.runtime.model import Model

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-python"
#: Prompt lengths, and tokens that are in the state before decoding is timed.
PREFILL, DEPTHS = (128, 512, 2048), (0, 2048, 100_000)
#: Steps before a sample, and what is left free for it and for them before the last position.
WARM, ROOM = 8, 128
FLOATS = ("fp16", "bf16", "fp32")
TINY = PRESETS["pythia-70m"] | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "torch_dtype": "float16",
}


@dataclass(frozen=True)
class Place:
    """Where a case finds its files, and what it runs on."""

    cache: Path
    preset: str
    precision: str
    provider: str
    dry_run: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the shape."""
        return TINY if self.preset == "tiny" else PRESETS[self.preset]

    @property
    def repeats(self) -> int:
        """Samples of each figure."""
        return 2 if self.dry_run else 10

    @property
    def steps(self) -> int:
        """Decode steps of a sample."""
        return 4 if self.dry_run else 64

    @property
    def checkpoint(self) -> Path:
        """A random checkpoint of the shape, made once."""
        folder = self.cache / self.preset
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self.cache.mkdir(parents=True, exist_ok=True)
            write_random(self.config, folder)
        return folder

    @property
    def folder(self) -> Path:
        """Where its export lies, or will."""
        return self._folder(self.preset)

    def _folder(self, name: str) -> Path:
        return self.cache / f"{name}-{self.precision}-{self.provider.partition(':')[0]}"

    @property
    def bundle(self) -> Path:
        """Its export, made once."""
        return self.export(self.checkpoint, self.preset)

    def export(self, checkpoint: Path, name: str) -> Path:
        """A bundle of this precision for this provider; an engine is built where one is needed."""
        folder = self._folder(name)
        if not (folder / "dijiang.json").is_file():
            engine = self.provider.startswith("tensorrt")
            options: dict[str, Any] = {"target": "tensorrt" if engine else "cuda"}
            if self.precision == "int4" and not engine and checkpoint != EXAMPLE:
                options["calibration_tokens"] = 0  # minutes, and random weights gain nothing
            self.cache.mkdir(parents=True, exist_ok=True)
            dijiang.export(checkpoint, folder, precision=self.precision, verify=False, **options)
            if engine:
                dijiang.build(folder, backend=self.provider.partition(":")[0])
        return folder

    def load(self, cuda_graph: bool | None = None) -> Model:
        """The bundle as a model on this provider."""
        on_gpu = None if self.provider == "cpu" else cuda_graph
        return dijiang.load(self.bundle, provider=self.provider, cuda_graph=on_gpu, check_hashes=False)


@dataclass(frozen=True)
class Case:
    """One kind of measurement.

    once: of the machine, not of each size.  precisions: that it has; None: all.  family: of the shapes
    that it has; None: all.
    """

    name: str
    run: Callable[[Place], dict[str, Any]]
    once: bool = False
    precisions: tuple[str, ...] | None = None
    family: str | None = None

    def covers(self, preset: str, precision: str) -> bool:
        """Whether it is measured for a shape in a precision."""
        family = "gpt_neox" if preset not in PRESETS else PRESETS[preset]["model_type"]
        return (self.precisions is None or precision in self.precisions) and self.family in (
            None,
            family,
        )


def bandwidth(place: Place) -> dict[str, Any]:
    """Bytes a second that the GPU's memory moves: device-to-device copies of 1 GiB, read and write."""
    if place.dry_run:
        from dijiang.machine.bandwidth import measure_bandwidth

        return {"bytes_per_second": measure_bandwidth().bytes_per_second, "of": "this machine's memory"}
    cuda, size, count = Cuda(), 1 << 30, 8
    source, target, stream = cuda.allocate(size), cuda.allocate(size), cuda.stream()
    samples = []
    for _ in range(place.repeats + 1):
        started = time.perf_counter()
        for _ in range(count):
            copy = (c_void_p(target), c_void_p(source), c_size_t(size), c_void_p(stream))
            cuda._call("cuMemcpyDtoDAsync_v2", *copy)
        cuda.synchronize(stream)
        samples.append(2 * size * count / (time.perf_counter() - started))
    cuda.free(source)
    cuda.free(target)
    return {"bytes_per_second": float(np.median(samples[1:])), "samples": samples[1:]}


def text_parity(place: Place) -> dict[str, Any]:
    """The trained example on its held-out text against float64."""
    bundle = place.export(EXAMPLE, "tiny-python")
    tokens = 512 if place.dry_run else 4096
    text = EXAMPLE / "held_out.txt"
    report = verify(bundle, EXAMPLE, text=text, tokens=tokens, provider=place.provider, store=False)
    return report.to_dict()


def parity(place: Place) -> dict[str, Any]:
    """A random model of the size against the float64 reference, prefill and steps."""
    report = verify(place.bundle, place.checkpoint, tokens=64, provider=place.provider, store=False)
    return report.to_dict()


def graphs(place: Place) -> dict[str, Any]:
    """A prompt of whole pieces, then decode steps, with and without CUDA graphs: bit for bit."""
    found = []
    for cuda_graph in (True, False):
        model = place.load(cuda_graph)
        state = model.new_state()
        # Each side of the states warms up, is captured and is replayed; then a rest.
        prompt = np.arange(6 * model._session.longest + 16)[None] % model.spec.vocab_size
        first = model.forward(prompt, state)
        steps = [model.forward(np.array([[t + 1]]), state).copy() for t in range(32)]
        found.append([first, *steps, *state.layers])
        del model
        gc.collect()
    differ = sum(not np.array_equal(a, b) for a, b in zip(*found, strict=True))
    return {"compared": len(found[0]), "different": differ}


def decode(place: Place) -> dict[str, Any]:
    """Seconds a greedy step, by depth and with CUDA graphs on and off; the depths take turns.

    A state of any depth has the same size and cost; so the position is set, and the state is that of a
    short prompt. A model with a table of positions has no depth beyond it.
    """
    results: dict[str, Any] = {"bytes_per_token": _bytes_per_token(place), "depths": {}}
    for label, cuda_graph in (("graph", None), ("plain", False)):
        model = place.load(cuda_graph)
        results[f"{label}_captured"] = bool(getattr(model._session, "cuda_graph", False))
        limit = model.manifest.positions_limit or max(DEPTHS) + ROOM
        depths = [d for d in DEPTHS if d + ROOM <= limit] if label == "graph" else [0]
        states = {depth: model.new_state() for depth in depths}
        samples: dict[int, list[float]] = {depth: [] for depth in depths}
        for _ in range(place.repeats):
            for depth, state in states.items():
                _greedy(model, state, WARM)  # and the numbers of this state are on the device
                state.position[:] = depth
                started = time.perf_counter()
                _greedy(model, state, place.steps)
                samples[depth].append((time.perf_counter() - started) / place.steps)
        results["depths"] |= {f"{label} @ d{depth}": found for depth, found in samples.items()}
        del model
        gc.collect()  # device memory goes with the last reference
    return results


def _greedy(model: Model, state: dijiang.State, steps: int) -> None:
    token, step = 1, model.decoder(state).pick
    for _ in range(steps):
        token = step(token)


def _bytes_per_token(place: Place) -> float:
    """What a decode step has to read and write: every weight but looked-up rows, and the state."""
    manifest = open_bundle(place.bundle, check_hashes=False).manifest
    return bundle_traffic(manifest.reads, manifest.spec.state_bytes).step(1, 0)


def prefill(place: Place) -> dict[str, Any]:
    """Seconds for a prompt, by its length and with CUDA graphs on and off."""
    random, found = np.random.default_rng(0), {}
    for label, cuda_graph in (("graph", None), ("plain", False)):
        model = place.load(cuda_graph)
        for length in PREFILL[:1] if place.dry_run else PREFILL:
            ids = random.integers(0, model.spec.vocab_size, (1, length))
            samples = []
            for _ in range(place.repeats + 1):
                state = model.new_state()
                started = time.perf_counter()
                model.forward(ids, state)
                samples.append(time.perf_counter() - started)
            found[f"{label} pp{length}"] = samples[1:]
        longest = model._session.longest
        del model
        gc.collect()
    return {"longest_piece": longest, "lengths": found}


def peer(kind: str) -> Callable[[Place], dict[str, Any]]:
    """A PyTorch side, in this process; an ImportError says that it is not installed."""

    def run(place: Place) -> dict[str, Any]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import gpu_torch

        return gpu_torch.measure(kind, place)

    return run


CASES = (
    Case("bandwidth", bandwidth, once=True),
    Case("text-parity", text_parity, once=True),
    Case("parity", parity),
    Case("graphs", graphs),
    Case("decode", decode),
    Case("prefill", prefill),
)
PEERS = tuple(
    Case(kind, peer(kind), precisions=FLOATS, family="gpt_neox")
    for kind in ("hf-eager", "hf-static", "hf-graph", "hf-compile", "torch-dijiang")
)
