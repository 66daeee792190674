"""One client of one server: how long a question waits after short and long documents, and what a token costs.

python benchmarks/one_client.py .steps -o report.json

.steps: where bundles of these shapes are, or are made, with random weights.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
from bundles import Place
from load import serving
from reports import tell

import dijiang

SHAPES, PRECISION = ("pythia-70m", "pythia-410m"), "int8"
#: Tokens of the documents; of a question; of an answer that is timed; turns of each measurement.
DOCUMENTS, QUESTION, ANSWER, TURNS = (100, 100_000), 16, 100, 40
#: Answers of each side, in turn: they are compared in pairs.
ROUNDS = 15


def waits(
    api: openai.OpenAI, model: str, kept: dict[int, str], draw: np.random.Generator
) -> dict[int, list[float]]:
    """Milliseconds to the first token of a question on each document, in turn."""
    found: dict[int, list[float]] = {length: [] for length in kept}
    for turn in range(TURNS):
        for length in sorted(kept, reverse=bool(turn % 2)):
            question = draw.integers(0, 1000, QUESTION).tolist()
            started = time.perf_counter()
            stream = api.completions.create(
                model=model,
                prompt=question,
                max_tokens=1,
                stream=True,
                extra_body={"previous_response_id": kept[length], "ignore_eos": True},
            )
            next(iter(stream))
            found[length].append(1e3 * (time.perf_counter() - started))
            stream.close()
    return found


def gaps(times: Iterator[float]) -> float:
    """Milliseconds between tokens, on average: the network may hand over several at once."""
    found = list(times)
    return 1e3 * (found[-1] - found[0]) / (len(found) - 1)


def tokens(api: openai.OpenAI, model: str) -> Iterator[float]:
    """When each token of an answer came."""
    options = {"model": model, "prompt": [5, 6, 7], "max_tokens": ANSWER, "temperature": 0, "stream": True}
    for _ in api.completions.create(**options, extra_body={"ignore_eos": True}):
        yield time.perf_counter()


def pieces(url: str, model: str) -> Iterator[float]:
    """The same for a client that reads bytes and nothing else: what the package costs is not the server's."""
    place = urlsplit(url)
    options = {"model": model, "prompt": [5, 6, 7], "max_tokens": ANSWER, "temperature": 0, "stream": True}
    body = json.dumps(options | {"ignore_eos": True}).encode()
    head = f"POST {place.path}/completions HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
    with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while piece := connection.recv(1 << 16):
            now = time.perf_counter()
            yield from [now] * piece.count(b"data: {")


def generated(model: dijiang.Model) -> Iterator[float]:
    """The same without a server."""
    for _ in model.generate([5, 6, 7], max_tokens=ANSWER, ignore_eos=True):
        yield time.perf_counter()


def measured(shape: str, bundle: Path, documents: tuple[int, ...]) -> dict[str, Any]:
    """The report of one shape."""
    name, draw = bundle.resolve().name, np.random.default_rng(1)
    plain = dijiang.load(bundle)
    with serving(bundle) as (_, url, _), openai.OpenAI(base_url=url, api_key="none", max_retries=0) as api:
        kept, fed = {}, {}
        for length in documents:
            started = time.perf_counter()
            prompt = draw.integers(0, 1000, length).tolist()
            found = api.completions.create(model=name, prompt=prompt, max_tokens=1, extra_body={"store": True})
            kept[length], fed[length] = found.id, time.perf_counter() - started
        asked = waits(api, name, kept, draw)
        sides: dict[str, list[float]] = {"generate": [], "server": [], "server, client of openai": []}
        for _ in range(ROUNDS):  # in turn
            sides["generate"].append(gaps(generated(plain)))
            sides["server"].append(gaps(pieces(url, name)))
            sides["server, client of openai"].append(gaps(tokens(api, name)))
    first = {length: float(np.median(found)) for length, found in asked.items()}
    without, within = (np.array(sides[side]) for side in ("generate", "server"))
    return {
        "model": shape,
        "precision": PRECISION,
        "document_s": {length: round(seconds, 2) for length, seconds in fed.items()},
        "first_token_ms": {length: round(found, 3) for length, found in first.items()},
        "first_token_ms_best": {length: round(min(found), 3) for length, found in asked.items()},
        "first_token_ratio": round(first[max(first)] / first[min(first)], 3),
        "token_ms": {side: round(float(np.median(found)), 3) for side, found in sides.items()},
        "token_ms_best": {side: round(min(found), 3) for side, found in sides.items()},
        "server_adds_ms": round(float(np.median(within - without)), 3),
        "server_adds": [round(float(share), 4) for share in np.percentile(within / without - 1, (25, 50, 75))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    bundles = {shape: Place(given.cache, shape, PRECISION, "cpu").bundle for shape in SHAPES}
    tell([measured(shape, bundle, DOCUMENTS) for shape, bundle in bundles.items()], given.output)


if __name__ == "__main__":
    main()
