"""A step of a plan in a process of its own: its time limit, its memory, its last line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any

import psutil

#: Seconds between two looks at a process's memory.
INTERVAL = 0.02


@dataclass(frozen=True)
class Ended:
    """What a process did; its peak memory without mapped file pages (anonymous) and with (resident)."""

    status: int
    seconds: float
    anonymous_bytes: int
    resident_bytes: int
    output: str
    errors: str

    @property
    def figures(self) -> dict[str, Any]:
        """Its time and memory, for a report."""
        names = ("seconds", "anonymous_bytes", "resident_bytes")
        return {name: getattr(self, name) for name in names}


def run(command: list[str], limit: float = float("inf"), show: bool = False) -> Ended | None:
    """Run a command; None if it did not end in `limit` seconds. show: what it says on stderr at once."""
    started, anonymous, resident = time.perf_counter(), 0, 0
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=None if show else errors, start_new_session=True)
        try:
            watch = psutil.Process(process.pid)
            while process.poll() is None:
                if time.perf_counter() - started > limit:
                    return None
                try:
                    memory = watch.memory_info()
                except psutil.Error:  # it ended between the two calls
                    continue
                anonymous = max(anonymous, memory.rss - memory.shared)
                resident = max(resident, memory.rss)
                time.sleep(INTERVAL)
        finally:
            if process.poll() is None:  # with all that it started
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        seconds = time.perf_counter() - started
        said = []
        for stream in (out, errors):
            stream.seek(0)
            said.append(stream.read())
    return Ended(status, seconds, anonymous, resident, *said)


def last_line(ended: Ended) -> dict[str, Any]:
    """The JSON that a process printed last, or what it said instead, as `error`."""
    printed, said = (text.strip().splitlines() for text in (ended.output, ended.errors))
    try:
        found: dict[str, Any] = json.loads(printed[-1])
    except (IndexError, ValueError):
        last = said[-1] if said else "without a word"
        found = {"error": f"the process ended with status {ended.status}: {last[:400]}"}
    return found | {"seconds_spent": round(ended.seconds, 1)}
