"""What benchmarks/gpu.py measures: reports of the one bench, parity, and whether CUDA graphs agree."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from bundles import EXAMPLE, Place, load_plain, peer_side

from dijiang.bench.matrix import Test
from dijiang.bench.measure import Effort
from dijiang.bench.report import Report
from dijiang.bench.runner import run_sides
from dijiang.bench.subject import Load, Side, load_bundle
from dijiang.bundle.opened import open_bundle
from dijiang.errors import BenchError
from dijiang.machine.bandwidth import BYTES, Bandwidth, measure_bandwidth, timed
from dijiang.machine.driver import Cuda
from dijiang.models.presets import PRESETS
from dijiang.parity.verify import verify

#: Prompt lengths, and tokens that are in the state before decoding is timed.
PREFILL, DEPTHS = (128, 512, 2048), (0, 2048, 100_000)
#: Precisions that PyTorch has, and the family of its models.
PEER_PRECISIONS, PEER_FAMILY = ("fp16", "bf16", "fp32"), "gpt_neox"
#: Tokens in a peer's cache when a sample ends: the paper's length; and that of a dry run.
LENGTH, SHORT = 2048, 128
#: Copies in a pass over a GPU's memory.
COPIES = 8


@dataclass(frozen=True)
class Run:
    """What a case is measured on, and how long."""

    place: Place
    dry_run: bool = False

    @property
    def steps(self) -> int:
        """Decode steps of a sample."""
        return 4 if self.dry_run else 64

    @property
    def label(self) -> str:
        """How a report names the bundle."""
        return f"{self.place.preset} {self.place.precision}"

    def report(self, side: Side, tests: list[Test], provider: str) -> Report:
        """A report of one side; BenchError if nothing could be measured."""
        effort, say = Effort(2 if self.dry_run else 10, 0.0, probe=False), partial(print, file=sys.stderr)
        report = run_sides([[side]], tests, effort, provider=provider, say=say)
        if not report["results"]:
            raise BenchError(report["errors"][0]["message"])
        return report


@dataclass(frozen=True)
class Case:
    """One kind of measurement. once: of the machine, not of each size; peer: a PyTorch side."""

    name: str
    run: Callable[[Run], dict[str, Any]]
    once: bool = False
    peer: bool = False

    def covers(self, preset: str, precision: str) -> bool:
        """Whether it is measured for a shape in a precision."""
        family = PRESETS.get(preset, {}).get("model_type", PEER_FAMILY)
        return not self.peer or (precision in PEER_PRECISIONS and family == PEER_FAMILY)


def measure_gpu_bandwidth(passes: int = 10) -> Bandwidth:
    """Bytes that the GPU's memory moves: device-to-device copies of 1 GiB, read and written."""
    cuda = Cuda()
    source, target, stream = cuda.allocate(BYTES), cuda.allocate(BYTES), cuda.stream()

    def copies() -> None:
        for _ in range(COPIES):
            cuda.copy(target, source, BYTES, stream)
        cuda.synchronize(stream)

    measured = timed(copies, 2 * BYTES * COPIES, passes)
    cuda.free(source)
    cuda.free(target)
    return measured


def bandwidth(run: Run) -> dict[str, Any]:
    """Of the GPU's memory; of this machine's in a dry run."""
    return asdict(measure_bandwidth() if run.dry_run else measure_gpu_bandwidth())


def parity(run: Run) -> dict[str, Any]:
    """A model against the float64 reference, prefill and steps: the trained example on its text."""
    place, trained = run.place, run.place.checkpoint == EXAMPLE
    text, tokens = (EXAMPLE / "held_out.txt", 512 if run.dry_run else 4096) if trained else (None, 64)
    options: dict[str, Any] = {"text": text, "tokens": tokens, "provider": place.provider}
    return verify(place.bundle, place.checkpoint, store=False, **options).to_dict()


def graphs(run: Run) -> dict[str, Any]:
    """A prompt of whole pieces, then decode steps, with and without CUDA graphs: bit for bit."""
    found = []
    for loads in (load_bundle, load_plain):
        subject = loads(str(run.place.bundle), None, run.place.provider)
        model, longest = subject.model, subject.facts["longest_piece"]
        state = model.new_state()
        # Each side of the states warms up, is captured and is replayed; then a rest.
        prompt = np.arange(6 * longest + 16)[None] % model.spec.vocab_size
        first = model.forward(prompt, state)
        steps = [model.forward(np.array([[t + 1]]), state).copy() for t in range(32)]
        found.append([first, *steps, *state.layers])
        del subject, model
        gc.collect()  # device memory goes with the last reference
    differ = sum(not np.array_equal(a, b) for a, b in zip(*found, strict=True))
    return {"compared": len(found[0]), "different": differ}


def ours(kind: str, loads: Load, way: str, depths: tuple[int, ...], run: Run) -> Report:
    """A report of the bundle; a model with a table of positions has no test beyond it."""
    side = run.place.side(" ".join(filter(None, (run.label, way))), loads)
    limit = open_bundle(run.place.bundle, check_hashes=False).manifest.positions_limit
    tests = [Test("pp", length) for length in (PREFILL[:1] if run.dry_run else PREFILL)]
    if kind == "tg":
        tests = [Test("tg", run.steps, depth) for depth in (depths[:2] if run.dry_run else depths)]
    tests = [test for test in tests if limit is None or test.end <= limit]
    return run.report(side, tests, run.place.provider)


def peer(kind: str, run: Run) -> Report:
    """A PyTorch side at the paper's length; an ImportError says that it is not installed."""
    from torch_models import Eager, Vanilla

    place, precision = run.place, run.place.precision
    test = Test("tg", run.steps, (SHORT if run.dry_run else LENGTH) - run.steps)
    loads = partial(Eager, precision=precision)
    if kind in CACHES:
        loads = partial(Vanilla, config=place.config, precision=precision, cache=CACHES[kind])
    side = peer_side(f"{kind} {run.label}", kind, precision, place.checkpoint, loads)
    return run.report(side, [test], "cpu" if run.dry_run else "cuda")


#: transformers' vanilla model -> the kind of its cache and step.
CACHES = {"hf-eager": "dynamic", "hf-static": "static", "hf-graph": "graph", "hf-compile": "compile"}
CASES = (
    Case("bandwidth", bandwidth, once=True),
    Case("text-parity", parity, once=True),
    Case("parity", parity),
    Case("graphs", graphs),
    Case("decode", partial(ours, "tg", load_bundle, "", DEPTHS)),
    Case("decode-plain", partial(ours, "tg", load_plain, "plain", DEPTHS[:1])),
    Case("prefill", partial(ours, "pp", load_bundle, "", ())),
    Case("prefill-plain", partial(ours, "pp", load_plain, "plain", ())),
    *(Case(kind, partial(peer, kind), peer=True) for kind in (*CACHES, "torch-dijiang")),
)
