"""Requests that no client should send: drawn by schemathesis from /openapi.json, and bytes at random.

python benchmarks/malformed.py BUNDLE --requests 10000 -o report.json

No answer may have a status of 500 or above, and the server may write no traceback.
"""

from __future__ import annotations

import argparse
import random
import re
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from load import serving
from reports import tell

#: Part of the requests that are bytes at random, and of those the part of clients that leave in the middle of one.
RAW, LEFT = 0.5, 0.1
#: Cases of schemathesis for each route in one round.
CASES = 300
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
COUNT = re.compile(r'dijiang_requests_total{route="[^"]*",status="(\d+)"} ([\d.]+)')
BODY = b'{"model": "%s", "prompt": "x", "max_tokens": 2, "stop": ["a"], "logit_bias": {"3": 1}, "stream": true}'


def statuses(base: str) -> Counter[str]:
    """Answers of a server so far, by status."""
    with urllib.request.urlopen(f"{base}/metrics") as page:
        found = COUNT.findall(page.read().decode())
    counted: Counter[str] = Counter()
    for status, count in found:
        counted[status] += int(float(count))
    return counted


def drawn(base: str, seed: int, cases: int) -> tuple[bool, str]:
    """One round of schemathesis: whether it found nothing, and what it wrote."""
    program = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    options = [
        "--checks",
        CHECKS,
        "--max-examples",
        str(cases),
        "--seed",
        str(seed),
        "--continue-on-failure",
        "-w",
        "1",  # hypothesis parses sources, and ast.parse of CPython 3.11 is not safe in two deep threads
    ]
    options += ["--phases", "fuzzing" if seed else "coverage,fuzzing"]  # what it covers does not depend on the seed
    quiet = ["--no-color", "--warnings", "off", "--generation-database", "none"]
    done = subprocess.run([*program, *options, *quiet, f"{base}/openapi.json"], capture_output=True, text=True)
    return done.returncode == 0, done.stdout


def changed(data: bytes, draw: random.Random) -> bytes:
    """Some bytes removed, added or exchanged."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(found) + 1)
        found[at : at + draw.choice((0, 1, 1, 9))] = draw.randbytes(draw.choice((0, 1, 1, 5)))
    return bytes(found)


def raw(base: str, model: str, draw: random.Random) -> str:
    """A request of changed bytes, in head or body; the status, `closed`, or `left`."""
    body, path = BODY % model.encode(), draw.choice((b"/v1/completions", b"/v1/chat/completions", b"/tokenize"))
    body, broken = (body, True) if draw.random() < 0.5 else (changed(body, draw), False)
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (
        path,
        len(body),
    )
    parts = urlsplit(base)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as sock:
        if draw.random() < LEFT:
            sock.sendall(head + body[: draw.randrange(len(body))])
            return "left"
        sock.sendall((changed(head, draw) if broken else head) + body)
        sock.shutdown(socket.SHUT_WR)
        try:
            line = sock.makefile("rb").readline().split()
        except ConnectionResetError:
            line = []
    return line[1].decode("ascii", "replace") if len(line) > 1 else "closed"


def measured(bundle: Path, requests: int, cases: int = CASES) -> dict[str, object]:
    """The report; schemathesis goes on until there were so many answers."""
    draw, model = random.Random(1), bundle.resolve().name
    with serving(bundle, "--slots", "4", "--max-tokens", "8", "--patience", "5") as (server, url, said):
        base, found = url.removesuffix("/v1"), ""
        torn = Counter(raw(base, model, draw) for _ in range(int(RAW * requests)))
        rounds = 0
        while (answered := statuses(base)).total() < requests and not found:
            good, told = drawn(base, rounds, cases)
            rounds, found = rounds + 1, "" if good else told
        alive = server.poll() is None
        faults = said.read_text().count("Traceback")
    return {
        "answers": answered.total(),
        "statuses": dict(sorted(answered.items())),
        "changed_bytes": dict(sorted(torn.items())),
        "rounds_of_schemathesis": rounds,
        "checks": CHECKS,
        "found": found,
        "server_errors": sum(count for status, count in (answered + torn).items() if status.startswith("5")),
        "tracebacks": faults,
        "alive": alive,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    report = measured(given.bundle, given.requests)
    tell(report, given.output)
    if report["found"] or report["server_errors"] or report["tracebacks"] or not report["alive"]:
        raise SystemExit("the server failed on a request; see the report")


if __name__ == "__main__":
    main()
