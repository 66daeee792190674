"""Our sides: bundles of random checkpoints of the published shapes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import dijiang
from dijiang.bench.subject import DijiangSubject, Load, Side, Traffic, bundle_side, load_bundle
from dijiang.bundle.opened import open_bundle
from dijiang.models.initial import write_random
from dijiang.models.load import load_checkpoint
from dijiang.models.presets import PRESETS
from dijiang.models.weights import is_decay_table
from dijiang.runtime.sessions.engines import BACKENDS

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-python"
TINY = PRESETS["pythia-70m"] | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Place:
    """Where the files of one shape lie, and what it is exported to.

    provider: as `dijiang run --provider` takes it.  options: of the export, beside precision.
    """

    cache: Path
    preset: str
    precision: str
    provider: str
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float16"

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the shape."""
        return PRESETS.get(self.preset, TINY)

    @property
    def engine(self) -> str | None:
        """What `dijiang build` builds for the provider; None: nothing."""
        name = self.provider.partition(":")[0]
        return name if name in BACKENDS else None

    @property
    def checkpoint(self) -> Path:
        """A random checkpoint of the shape, made once; of `tiny-python` the trained one."""
        if self.preset == EXAMPLE.name:
            return EXAMPLE
        folder = self.cache / f"{self.preset}-{self.dtype}"
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self.cache.mkdir(parents=True, exist_ok=True)
            write_random(self.config, folder, dtype=self.dtype)
        return folder

    @property
    def folder(self) -> Path:
        """Where its export lies, or will."""
        parts = (self.preset, self.precision, self.provider.partition(":")[0])
        return self.cache / "-".join((*parts, *(str(value) for _, value in self.options)))

    @property
    def bundle(self) -> Path:
        """Its export, made once; what is random is not calibrated: that changes no time."""
        if not (self.folder / "dijiang.json").is_file():
            calibrated = self.engine or self.preset == EXAMPLE.name
            options = dict(self.options) | ({} if calibrated else {"calibration_tokens": 0})
            options |= {"precision": self.precision, "verify": False, "force": True}
            self.cache.mkdir(parents=True, exist_ok=True)
            dijiang.export(self.checkpoint, self.folder, **options)
            if self.engine:
                dijiang.build(self.folder, backend=self.engine)
        return self.folder

    def side(self, name: str, loads: Load = load_bundle) -> Side:
        """The bundle as a side of a bench, with the numbers that its weights are."""
        side = bundle_side(name, open_bundle(self.bundle, check_hashes=False), loads)
        return replace(side, facts=side.facts | {"parameters": parameters(self.checkpoint)})


def peer_side(name: str, kind: str, precision: str, path: Path, loads: Load, weights: int = 0) -> Side:
    """A side that is no bundle. weights: bytes of them; 0: unknown."""
    facts = {"kind": kind, "precision": precision, "graph": None, "bytes": weights, "spec": None}
    return Side(name, str(path), loads, Traffic(weights), facts)


def parameters(folder: Path) -> dict[str, int]:
    """`all` but D1 and D2; `step`: those that one decode step reads; `head` of these.

    A step reads every matrix and the head once, and one row of the embedding.
    """
    weights = load_checkpoint(folder).weights
    sizes = {name: int(np.prod(weights.shape(name))) for name in weights if not is_decay_table(name)}
    total = sum(sizes.values())
    return {"all": total, "step": total - sizes["embed.weight"], "head": sizes["head.weight"]}


def load_plain(path: str, threads: int | None, provider: str) -> DijiangSubject:
    """A bundle without CUDA graphs."""
    return DijiangSubject(
        dijiang.load(path, provider=provider, threads=threads, cuda_graph=False, check_hashes=False)
    )


def load_graph(path: str, threads: int | None, provider: str, *, graph: str) -> DijiangSubject:
    """One graph of a bundle."""
    return DijiangSubject(dijiang.load(path, graph=graph, provider=provider, threads=threads, check_hashes=False))


def load_loops(path: str, threads: int | None, provider: str) -> DijiangSubject:
    """A bundle with two more loops: records of `Model.generate`, and its bare bound session."""
    subject = load_bundle(path, threads, provider)
    model = subject.model

    def records(tokens: np.ndarray, state: Any) -> Iterator[np.ndarray]:
        found = model.generate(tokens, state=state, max_tokens=1 << 40, ignore_eos=True)
        next(found)  # the prompt's one token, and the binding of this state
        return (tokens for _ in found)

    def bare(tokens: np.ndarray, state: Any) -> Iterator[np.ndarray]:
        session: Any = model.session
        output = session.run(session.step(state), state)

        def steps() -> Iterator[np.ndarray]:
            while True:
                session._session.run_with_iobinding(output.io)
                yield tokens

        return steps()

    subject.ways = {"generate": records, "bare": bare}
    return subject
