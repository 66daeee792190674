"""Timing one repetition: the clock is read once a token and nothing else is done between tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..machine.sensors import load_nvml
from .matrix import Test
from .subject import SelfTimed, Subject

#: Decode steps of a warm-up.
WARM_STEPS = 8


@dataclass
class LoopClock:
    """Times a subject's own loops, as SelfTimed; tests that differ only in depth or way share a state.

    chosen: tokens [B] of the last decode step.
    """

    subject: Subject
    state: Any
    chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def warm_up(self, test: Test) -> None:
        """Once over the same path; not part of any figure."""
        self._run(test, min(test.tokens, WARM_STEPS))

    def seconds(self, test: Test) -> list[float]:
        """Seconds of the prompt (pp: one value), or of each generated token (tg)."""
        return self._run(test, test.tokens)

    def peaks(self) -> dict[str, int | None]:
        """Peak bytes: `host` (resident set), `device` (GPU memory of this process)."""
        return {"host": peak_host_bytes(), "device": device_bytes()}

    def ids(self, test: Test) -> np.ndarray:
        """What is fed: a prompt [B, tokens], or the first token [B, 1]."""
        shape = (test.batch, test.tokens if test.prompt else 1)
        return np.random.default_rng(test.tokens).integers(self.subject.vocab_size, size=shape)

    def _run(self, test: Test, tokens: int) -> list[float]:
        subject, state, ids, now = self.subject, self.state, self.ids(test), time.perf_counter
        subject.rewind(state, test.depth)
        if test.prompt:
            stamps = [now()]
            subject.prefill(ids, state)
            stamps.append(now())
        else:
            loop = getattr(subject, "ways", {}).get(test.way, subject.steps)
            steps = islice(loop(ids[:, 0], state), tokens)
            stamps = [now()]
            for self.chosen in steps:
                stamps.append(now())
        return np.diff(stamps).tolist()


def clock_of(subject: Subject | SelfTimed, tests: Sequence[Test]) -> SelfTimed | LoopClock:
    """What times these tests of a subject: the subject itself, if it has a clock."""
    if isinstance(subject, SelfTimed):
        return subject
    deepest = max(tests, key=lambda test: test.end)
    return LoopClock(subject, subject.at(deepest.batch, deepest.depth, deepest.end))


def peak_host_bytes() -> int | None:
    """Largest resident set of this process so far.

    VmHWM counts this program alone; getrusage would count the parent's pages from before the exec.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def device_bytes() -> int | None:
    """GPU memory of this process on all GPUs, as NVML shows it; None without one."""
    nvml = load_nvml()
    if nvml is None:
        return None
    return sum(
        process.usedGpuMemory or 0
        for index in range(nvml.nvmlDeviceGetCount())
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index))
        if process.pid == os.getpid()
    )
