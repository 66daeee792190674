"""Requests of strangers to a server on loopback: values of JSON and bytes of HTTP."""

from __future__ import annotations

import atexit
import json
import random
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz import bundles, states
from tests.fuzz.grammar import Case
from tests.fuzz.trees import bytes_edit, edit_bytes, edit_tree, tree_edit
from tests.server.serving import KEY, Running, running

#: A good body by route; every field that a server may read.
PLAIN: dict[str, Any] = {"model": "m", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "n": 2}
PLAIN |= {"stop": ["x"], "logit_bias": {"3": 1}, "stream": False, "user": "u"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "properties": {}}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": PLAIN | {"prompt": "ab", "logprobs": 2, "echo": True},
    "/v1/chat/completions": PLAIN | {"messages": [{"role": "user", "content": "ab"}], "response_format": SCHEMA},
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}, "n": 1, "echo": False}
METHODS = ("POST", "GET", "PUT", "X" * 50, "")
PATHS = ("/v1/models", "/", "/metrics", "/v1/completions", "/../x", "/v1/\x00", "/" + "a" * 9000, "*")


def warm() -> None:
    bundles.warm()


@cache
def server() -> Running:
    """A server that lives as long as its worker."""
    stack = ExitStack()
    atexit.register(stack.close)
    options: dict[str, Any] = {"slots": 2, "max_tokens": 8, "max_prompt": 100, "timeout": 4.0, "patience": 1.0}
    options |= {"keep_alive": 1.0}  # some cases leave the connection open
    return stack.enter_context(running({"m": states.model()}, seal_key=KEY, **options))


def draw_case(seed: int, number: int) -> Case:
    draw = random.Random(f"requests {seed} {number}")
    verb = draw.choice(["json", "json", "json", "stream", "bytes", "http"])
    body = draw.choice(list(BODIES))
    edit = tree_edit if verb in ("json", "stream") else bytes_edit
    edits = [edit(draw) for _ in range(draw.choice([1, 1, 2]))]
    line = [draw.choice(METHODS), draw.choice(PATHS)] if draw.random() < 0.3 else ["POST", body]
    return {"class": "requests", "verb": verb, "body": body, "line": line, "edits": edits}


def content(case: Case) -> bytes:
    """The body of a case."""
    data = json.dumps(BODIES[case["body"]] | (STREAM if case["verb"] == "stream" else {})).encode()
    for edit in case["edits"]:
        if case["verb"] in ("json", "stream"):
            try:
                data = edit_tree(json.loads(data), edit).encode()
            except (ValueError, RecursionError):
                break
        elif case["verb"] == "bytes":
            data = edit_bytes(data, edit)
    return data


def attempt(case: Case, folder: Path) -> str:
    """Send it; the status. Whatever was sent, the next good request is answered."""
    found, body, started = server(), content(case), time.monotonic()
    method, path = case["line"] if case["verb"] == "http" else ("POST", case["body"])
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    data = head.encode() + body
    if case["verb"] == "http":
        for edit in case["edits"]:
            edit = [edit[0], edit[1] % 200, edit[2]]
            data = edit_bytes(data, edit)
    try:
        answer = found.raw(data)
    except ConnectionError:
        answer = b""
    status = answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"
    assert status < "500" or status == "closed", answer[:2000]
    assert case["verb"] == "http" or status != "closed", "closed without an answer"
    assert b"Traceback" not in answer, answer[:2000]
    assert time.monotonic() - started < 8, "seconds"
    assert found.ask("/v1/models")[0] == 200
    return status
