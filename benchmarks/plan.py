"""What every plan does: steps in processes of their own, and a JSON file with a page made of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil

from dijiang.errors import BenchError

HERE = Path(__file__).parent
RESULTS = HERE / "results"
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
        return {name: getattr(self, name) for name in ("seconds", "anonymous_bytes", "resident_bytes")}


def run(command: list[Any], limit: float = float("inf"), show: bool = False) -> Ended | None:
    """Run a command; None if it did not end in `limit` seconds. show: what it says on stderr at once."""
    started, anonymous, resident = time.perf_counter(), 0, 0
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        stderr = None if show else errors
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=stderr, start_new_session=True)
        try:
            watch = psutil.Process(process.pid)
            while process.poll() is None:
                if time.perf_counter() - started > limit:
                    return None
                try:
                    memory = watch.memory_info()
                except psutil.Error:  # it ended between the two calls
                    continue
                anonymous, resident = max(anonymous, memory.rss - memory.shared), max(resident, memory.rss)
                time.sleep(INTERVAL)
        finally:
            if process.poll() is None:  # with all that it started
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        seconds = time.perf_counter() - started
        for stream in (out, errors):
            stream.seek(0)
        return Ended(status, seconds, anonymous, resident, out.read(), errors.read())


def keep(results: dict[str, Any], file: Path) -> None:
    """Write the results whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def kept(file: Path, **same: Any) -> dict[str, Any] | None:
    """What an earlier call measured; None: nothing. BenchError where it was not by the `same` options."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    for name, value in same.items() if found else ():
        if found[name] != value:
            raise BenchError(f"{file}: measured with {name} {found[name]}, expected {value}; give another --name")
    return found
