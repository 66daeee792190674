"""Our side: bundles of a random checkpoint, measured through `Model.forward` and `Model.generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dijiang
from dijiang.runtime.state import State

#: Tokens that are really computed before the position is set to a depth beyond REAL_DEPTH.
REAL_DEPTH = 8192
PIECE = 512
#: Runs some steps; seconds.
Block = Callable[[], float]


def checkpoint(cache: Path, preset: str) -> Path:
    """A random float32 DiJiang checkpoint of a published shape."""
    from dijiang.models.initial import init

    folder = cache / preset
    return folder if folder.is_dir() else init(preset, folder, dtype="float32")


def bundle(cache: Path, preset: str, kind: str) -> Path:
    """Its bundle, kind: PRECISION or PRECISION-DIALECT (`native` if none is named).

    The graph is that of the exporter as it is now, so old ones are replaced. Nothing is calibrated: how
    random weights are rounded changes no time.
    """
    target = cache / f"{preset}-{kind}"
    precision, _, dialect = kind.partition("-")
    dijiang.export(
        checkpoint(cache, preset),
        target,
        precision=precision,
        dialect=dialect or "native",
        calibration_tokens=0,
        verify=False,
        force=True,
    )
    return target


def parameters(folder: Path) -> dict[str, int]:
    """`all` but D1 and D2; `step`: those that one decode step reads; `head` of these.

    A step reads every matrix and the head once, and one row of the embedding.
    """
    from dijiang.models.load import load_checkpoint
    from dijiang.models.weights import is_decay_table

    weights = load_checkpoint(folder).weights
    sizes = {name: int(np.prod(weights.shape(name))) for name in weights if not is_decay_table(name)}
    total = sum(sizes.values())
    return {"all": total, "step": total - sizes["embed.weight"], "head": sizes["head.weight"]}


class Ours:
    """One bundle.

    Depths up to REAL_DEPTH are really computed once, kept beside the bundle, and copied for each sample;
    beyond it the state is that of REAL_DEPTH tokens and its position is set.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self.model = dijiang.load(folder, threads=threads, check_hashes=False)
        self._random = np.random.default_rng(0)
        self._states: dict[int, State] = {}
        self._pairs: dict[tuple[int, ...], tuple[Block, Block]] = {}

    def prefill(self, tokens: int, repeat: int) -> list[float]:
        """Seconds for a prompt of `tokens` into a new state, `repeat` times."""
        ids = self._ids(tokens)
        samples = []
        for _ in range(repeat):
            state = self.model.new_state()
            started = time.perf_counter()
            self.model.forward(ids, state)
            samples.append(time.perf_counter() - started)
        return samples

    def decode(self, depth: int, tokens: int, repeat: int) -> list[float]:
        """Seconds for `tokens` greedy steps of `Model.generate` after `depth` tokens."""
        return [self._generate(depth, tokens) for _ in range(repeat)]

    def _generate(self, depth: int, tokens: int) -> float:
        return self._steps(self.state(depth).clone(), tokens)

    def _steps(self, state: State, tokens: int) -> float:
        """Seconds for `tokens` greedy steps of `Model.generate`."""
        records = self.model.generate([1], state=state, max_tokens=tokens + 1, ignore_eos=True)
        next(records)  # the prompt's one token, and the binding of this state
        started = time.perf_counter()
        for _ in records:
            pass
        return time.perf_counter() - started

    def state(self, depth: int) -> State:
        """The state after `depth` tokens: from memory, from its file, or computed now."""
        if depth not in self._states:
            real = min(depth, REAL_DEPTH)
            file = self._folder.with_name(f"{self._folder.name}-d{real}.npz")
            if file.is_file() and file.stat().st_mtime > self._folder.stat().st_mtime:
                state = State.load(file)
            else:
                state = self.model.new_state()
                for start in range(0, real, PIECE):
                    self.model.forward(self._ids(min(PIECE, real - start)), state)
                state.save(file)
            state.position[:] = depth
            self._states[depth] = state
        return self._states[depth]

    def _ids(self, tokens: int) -> np.ndarray:
        return self._random.integers(self.model.spec.vocab_size, size=(1, tokens))

    def far_and_near(self, near: int, far: int, tokens: int, repeat: int) -> list[float]:
        """Seconds for `tokens` steps after `far` tokens and after `near`, `repeat` times in turn."""

        def block(depth: int) -> Block:
            state = self.state(depth).clone()
            return lambda: self._steps(state, tokens)

        return self._turns((near, far, tokens), lambda: (block(far), block(near)), repeat)

    def loop_and_bare(self, tokens: int, repeat: int) -> list[float]:
        """Seconds for `tokens` steps by `Model.generate`, and by a binding of its session alone."""

        def blocks() -> tuple[Block, Block]:
            state = self.state(0).clone()
            decoder: Any = self.model.decoder(state)
            decoder.pick(1)
            run, io = decoder._binding._session.run_with_iobinding, decoder._binding._io

            def bare() -> float:
                started = time.perf_counter()
                for _ in range(tokens):
                    run(io)
                return time.perf_counter() - started

            return lambda: self._steps(state, tokens), bare

        return self._turns((tokens,), blocks, repeat)

    def _turns(self, key: tuple[int, ...], make: Callable[[], tuple[Block, Block]], repeat: int) -> list[float]:
        """Seconds of both blocks, `repeat` times; which one runs first changes from time to time."""
        if key not in self._pairs:
            self._pairs[key] = make()
        first, second = self._pairs[key]
        samples = []
        for turn in range(repeat):
            if turn % 2:
                later = second()
                samples += [first(), later]
            else:
                samples += [first(), second()]
        return samples
