"""Many clients of one server, some of them rude; what they got, and what was left.

python benchmarks/load.py BUNDLE --clients 200 --slots 16 --seconds 300 -o report.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import openai
import psutil
from reports import tell

#: Of ten clients: five of the official package, and one of each rude kind.
KINDS = (*("polite",) * 5, "leaves", "kills", "reads slowly", "is silent", "stops halfway")
ADDRESS = re.compile(r"listening on (http://[^\s\]]+)")
#: Seconds that a client waits after 429, and tokens that it asks for.
PAUSE, TOKENS = 1.0, 24
#: Seconds of load before anything is counted, and until the server's patience with silent clients has ended.
WARM, SETTLE = 15.0, 25.0
#: Seconds between two looks at the server's memory.
WATCH = 10.0


class Load:
    """Clients of one server, and what they saw."""

    def __init__(self, url: str, model: str, end: float) -> None:
        self.url, self.model, self.end = url, model, end
        self.port = int(url.rsplit(":", 1)[1].split("/")[0])
        self.statuses: Counter[str] = Counter()
        self.first: list[float] = []
        self.tokens: Counter[int] = Counter()

    async def client(self, number: int) -> None:
        """One client until the end."""
        kind, draw = KINDS[number % len(KINDS)], random.Random(number)
        await asyncio.sleep(draw.random())
        async with openai.AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120) as api:
            while time.monotonic() < self.end:
                prompt = "def f(x):\n" * draw.randint(1, 30)
                try:
                    await (self.polite(api, number, prompt) if kind == "polite" else self.rude(kind, prompt))
                except openai.APIStatusError as error:
                    self.statuses[str(error.status_code)] += 1
                    await asyncio.sleep(PAUSE * draw.uniform(0.5, 1.5))
                except (openai.APIError, OSError) as error:
                    self.statuses[type(error).__name__] += 1

    async def polite(self, api: openai.AsyncOpenAI, number: int, prompt: str) -> None:
        """A stream, read to its end."""
        started, first = time.monotonic(), None
        stream = await api.completions.create(model=self.model, prompt=prompt, max_tokens=TOKENS, stream=True)
        async for _ in stream:
            first = first or time.monotonic()
            self.tokens[number] += 1
        self.statuses["200"] += 1
        if first is not None:
            self.first.append(first - started)

    async def rude(self, kind: str, prompt: str) -> None:
        """A socket that is left, killed, read slowly, never used, or half open after half of a request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 12)
        try:
            if kind == "is silent":
                await asyncio.sleep(min(10, max(0.0, self.end - time.monotonic())))
                return
            body = json.dumps({"model": self.model, "prompt": prompt, "max_tokens": 400, "stream": True}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            if kind == "stops halfway":
                writer.write((head + body)[: len(head) + len(body) // 2])
                await asyncio.sleep(min(10, max(0.0, self.end - time.monotonic())))
                return
            writer.write(head + body)
            status = (await reader.readline()).split()
            self.statuses[status[1].decode() if len(status) > 1 else "closed"] += 1
            if kind == "reads slowly":
                for _ in range(5):
                    await asyncio.sleep(1)
                    await reader.read(100)
            elif kind == "kills":
                writer.transport.abort()
            await asyncio.sleep(PAUSE)
        finally:
            writer.close()


def left(process: psutil.Process) -> dict[str, float]:
    """What a process holds."""
    return {
        "memory_mib": round(process.memory_info().rss / (1 << 20), 1),
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def slots_taken(url: str) -> float:
    """Generations that the server has on their way; none of them is anybody's once its clients have gone."""
    with urlopen(url.removesuffix("/v1") + "/metrics") as page:
        return float(re.search(rb"^dijiang_generations\{.*\} (.*)$", page.read(), re.MULTILINE)[1])


def fairness(counts: list[int]) -> float:
    """Jain's index: 1 where all got as much, 1/n where one got all."""
    return float(np.square(np.sum(counts)) / (len(counts) * np.sum(np.square(counts, dtype=float))))


async def measured(
    url: str, model: str, clients: int, seconds: float, process: psutil.Process
) -> tuple[Load, list[float]]:
    """A load that has ended, and the server's memory at times of it, MiB."""
    load, memory = Load(url, model, time.monotonic() + seconds), list[float]()

    async def watch() -> None:
        while time.monotonic() < load.end:
            memory.append(left(process)["memory_mib"])
            await asyncio.sleep(WATCH)

    await asyncio.gather(watch(), *(load.client(number) for number in range(clients)))
    return load, memory


def slope(memory: list[float]) -> float:
    """MiB a minute, by least squares."""
    return float(np.polyfit(np.arange(len(memory)) * WATCH / 60, memory, 1)[0]) if len(memory) > 1 else 0.0


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """A server in a process of its own, on loopback; its address, and the file of its standard error."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        program = [sys.executable, "-m", "dijiang", "serve", str(bundle), "--port", "0", *options]
        with said.open("w") as stderr:
            server = subprocess.Popen(program, stderr=stderr, text=True)
        try:
            while not (found := ADDRESS.search(said.read_text())):
                if server.poll() is not None:
                    raise SystemExit(f"the server did not start: {said.read_text()}")
                time.sleep(0.05)
            yield server, found[1], said
        finally:
            server.terminate()
            server.wait()
            print(said.read_text()[-2000:], file=sys.stderr, end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    model = given.bundle.resolve().name
    with serving(given.bundle, "--slots", str(given.slots), "--prefix-memory", "0") as (server, url, _):
        process = psutil.Process(server.pid)
        asyncio.run(measured(url, model, given.clients, WARM, process))  # what is allocated once
        time.sleep(SETTLE)
        before = left(process) | {"slots": slots_taken(url)}
        load, memory = asyncio.run(measured(url, model, given.clients, given.seconds, process))
        time.sleep(SETTLE)
        polite = [load.tokens[n] for n in range(given.clients) if KINDS[n % len(KINDS)] == "polite"]
        report = {
            "clients": given.clients,
            "slots": given.slots,
            "seconds": given.seconds,
            "statuses": dict(sorted(load.statuses.items())),
            "first_token_s": {f"p{p}": round(float(np.percentile(load.first, p)), 3) for p in (50, 95, 99)},
            "tokens_of_a_client": {f"p{p}": float(np.percentile(polite, p)) for p in (0, 5, 50, 95, 100)},
            "fairness": round(fairness(polite), 3),
            "before": before,
            "after": left(process) | {"slots": slots_taken(url)},
            "memory_mib_every_10_s": memory,
            "memory_mib_a_minute": {
                "first half": round(slope(memory[: len(memory) // 2]), 2),
                "second half": round(slope(memory[len(memory) // 2 :]), 2),
            },
        }
        tell(report, given.output)


if __name__ == "__main__":
    main()
