"""Clients that wait, leave, do not read or come all at once: nothing is kept of them, and nobody else waits."""

import asyncio
import gc
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime

import numpy as np
import pytest
from load import slots_taken

from dijiang.runtime.options import Generation
from dijiang.runtime.sequence import Record
from dijiang.server.answers import Answer
from dijiang.server.relay import Post, Told
from dijiang.server.wanted import Wanted
from tests.server.serving import events, running


def test_client_that_leaves_in_the_middle_of_its_request_is_no_fault(served, caplog):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    for _ in range(5):
        with served.connect() as sock:
            sock.sendall(head)
    gone, end = 'dijiang_requests_total{route="/v1/completions",status="499"} 5.0', time.monotonic() + 5
    while gone not in served.ask("/metrics")[2] and time.monotonic() < end:
        time.sleep(0.01)
    assert gone in served.ask("/metrics")[2]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_silent_and_slow_clients_are_let_go(models):
    with running(models, patience=0.3, slots=1) as server:
        started = time.monotonic()
        assert server.raw(b"") == b""  # never asks
        assert server.raw(b"POST /v1/comp") == b""  # asks half
        found = server.raw(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert found.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started < 5
        assert server.ask("/healthz")[0] == 200


@pytest.mark.parametrize("body", [b"", b"Content-Length: 5\r\n"], ids=["next", "rest"])
def test_patience_holds_for_every_request_of_a_connection(models, body):
    """Also for a body that no answer needed."""
    with running(models, patience=0.3, slots=1) as server, server.connect() as sock:
        sock.settimeout(10)
        for _ in range(2 if not body else 1):
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + body + b"\r\n")
            found = b""
            while not found.endswith(b"}"):
                found += sock.recv(1 << 16)
            assert found.startswith(b"HTTP/1.1 200 ")
        started = time.monotonic()
        sock.sendall(b"P")
        with suppress(ConnectionResetError):
            assert sock.recv(1 << 16) == b""
        assert time.monotonic() - started < 3


def test_prompt_that_is_not_ready_in_time_is_408_and_blocks_nobody(models, monkeypatch):
    with running(models, slots=1, timeout=0.5) as server:
        hosted, ready = server.server.models["tiny"], threading.Event()
        turns = hosted._turns
        monkeypatch.setattr(hosted, "_turns", lambda *given: ready.wait(20) and turns(*given))
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
        assert [server.ask("/v1/completions", body)[0] for _ in range(3)] == [408] * 3
        assert hosted.load == 0
        ready.set()
        assert server.ask("/v1/completions", body)[0] == 200


def test_who_does_not_read_loses_the_connection_and_the_slot(models):
    with running(models, patience=0.3, slots=1, max_tokens=100_000, buffer=8192) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100_000, "stream": True, "ignore_eos": True}
        data = json.dumps(body | {"logprobs": 20}).encode()
        with server.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
            end = time.monotonic() + 5
            while not server.server.models["tiny"].load and time.monotonic() < end:
                time.sleep(0.001)
            assert server.server.models["tiny"].load == 1
            assert server.idle(15)


def test_who_goes_frees_the_slot(models):
    with running(models, slots=1, max_tokens=100_000) as server:
        for stream in (True, False):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 100_000, "stream": stream, "ignore_eos": True}
            data = json.dumps(body).encode()
            with server.connect() as sock:
                sock.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
                    + data
                )
                while not server.server.models["tiny"].batcher.scheduler.running:
                    time.sleep(0.01)
            assert server.idle(2)


def test_full_queue_is_429_and_time_is_408(models):
    with running(models, slots=1, queue=1, timeout=1.0, max_tokens=100_000) as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 100_000, "ignore_eos": True}
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(server.ask("/v1/completions", body))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(status for status, *_ in found) == [408, 408, 429, 429]
        refused = next(f for f in found if f[0] == 429)
        late = next(f for f in found if f[0] == 408)
        assert late[1]["x-should-retry"] == "false"  # it would take as long again: openai's client reads it
        assert (refused[1]["retry-after"], refused[2]["error"]["type"]) == ("1", "rate_limit_error")
        pieces = server.ask("/v1/completions", body | {"stream": True})[2]
        assert "took more than 1 s" in events(pieces)[-1]["error"]["message"]
        assert server.idle()


def test_many_clients_of_all_kinds_leave_nothing(models, served):
    """A sample of the long load: benchmarks/load.py."""
    with running(models, slots=4, queue=8, patience=20.0) as server:
        assert server.ask("/healthz")[0] == 200
        before = len(os.listdir("/proc/self/fd"))
        found = []

        def one(number):
            body = {"model": "tiny", "prompt": "x " * (1 + number % 9), "max_tokens": 6, "stream": number % 2 == 0}
            if number % 7 == 3:  # goes at once
                with server.connect() as sock:
                    data = json.dumps(body | {"stream": True}).encode()
                    sock.sendall(
                        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
                        % len(data)
                        + data
                    )
                return
            found.append(server.ask("/v1/completions", body)[0])

        threads = [threading.Thread(target=one, args=(number,)) for number in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) <= {200, 429}
        # 4 + 8 places, of which those that go at once may have had one each.
        assert found.count(200) >= 12 - sum(number % 7 == 3 for number in range(60))
        assert server.idle()
        end = time.monotonic() + 10
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < end:
            time.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) <= before
        steps = [thread.name for thread in threading.enumerate() if thread.name.startswith("steps of")]
        assert steps.count("steps of other") == 2  # of this server and of the fixture's


#: Requests of each kind between two looks at the memory.
ROUNDS = 75


def test_requests_leave_no_objects(models):
    """Answers, streams, refusals and clients that go at once: no block of memory is kept for any kind of them."""
    body, patience = {"model": "tiny", "prompt": "x", "max_tokens": 3}, 0.5
    left = json.dumps(body | {"stream": True, "max_tokens": 400}).encode()
    left = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(left) + left

    def blocks_after(server, count):
        for _ in range(count):
            assert server.ask("/v1/completions", body)[0] == 200
            assert server.ask("/v1/completions", body | {"stream": True})[0] == 200
            assert server.ask("/v1/completions", body | {"n": "many"})[0] == 400
            with server.connect() as sock:
                sock.sendall(left)
        assert server.idle()
        time.sleep(1.2 * patience)  # timers of connections end
        gc.collect()
        return sys.getallocatedblocks()

    with running(models, slots=4, queue=40, patience=patience) as server:
        looks = [blocks_after(server, count) for count in (20, ROUNDS, ROUNDS, ROUNDS)]
        assert min(np.diff(looks)) < ROUNDS  # caches fill at first


def test_load_sees_slots_that_are_taken(served):
    body = {"model": "tiny", "prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 4000}
    data = json.dumps(body).encode()
    with served.connect() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data))
        sock.sendall(data)
        assert sock.recv(100)
        assert slots_taken(served.url) == 1
    assert served.idle()
    assert slots_taken(served.url) == 0


def test_stream_is_noted_at_its_end_with_what_the_client_was_told(models, caplog):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with caplog.at_level("INFO", logger="dijiang.server"), running(models, timeout=0.05, slots=1) as late:
        text = late.ask("/v1/completions", body | {"max_tokens": 4096})[2]
        assert events(text)[-1]["error"]["type"] == "invalid_request_error"
    with caplog.at_level("INFO", logger="dijiang.server"), running(models, slots=1) as server:
        _, headers, text = server.ask("/v1/completions", body)
        with server.connect() as sock:
            asked = json.dumps(body | {"max_tokens": 4096}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(asked)}\r\n\r\n"
            sock.sendall(head.encode() + asked)
            sock.recv(100)
        assert server.idle()
    lines = [json.loads(record.message) for record in caplog.records if record.name == "dijiang.server"]
    assert [line["status"] for line in lines] == [408, 200, 499]
    assert lines[0]["ms"] >= 50
    assert (lines[1]["id"], lines[1]["model"]) == (headers["x-request-id"], "tiny")
    assert (lines[1]["prompt_tokens"], lines[1]["completion_tokens"]) == (1, 300)
    assert datetime.fromisoformat(lines[1]["time"]).tzinfo is not None


def test_seeds_may_have_a_sign_and_choices_share_no_numbers(served):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 8, "temperature": 1.5, "ignore_eos": True}
    texts = [
        choice["text"]
        for seed in range(-4, 4)
        for choice in served.ask("/v1/completions", body | {"seed": seed, "n": 4})[2]["choices"]
    ]
    assert len(set(texts)) >= 31
    assert served.ask("/v1/completions", body | {"seed": -(2**63) - 1})[0] == 400


def test_who_reads_slowly_gets_all(models):
    """Longer than the patience, which is for those that read nothing."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1500, "stream": True, "ignore_eos": True, "logprobs": 20}
    with running(models, patience=0.5, slots=1, buffer=8192) as server, server.connect() as sock:
        data, found, started = json.dumps(body).encode(), b"", time.monotonic()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        while piece := sock.recv(1 << 16):
            found += piece
            time.sleep(0.1)
    assert time.monotonic() - started > 2 * 0.5
    assert b"data: [DONE]" in found[-100:]


def test_what_waits_for_a_slow_reader_is_small(served):
    """Logits have the vocabulary's size: a client that reads slowly, or not at all, kept them all waiting."""
    hosted = served.server.models["tiny"]
    loop, inbox = asyncio.new_event_loop(), asyncio.Queue()
    logits = np.random.default_rng(0).standard_normal(hosted.model.spec.vocab_size).astype(np.float32)
    record = next(hosted.model.generate("x", max_tokens=1))
    Post(loop, inbox, 0, 5).record(record, logits)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    told = inbox.get_nowait()
    assert [token for token, _ in told.nats] == [record.token, *np.argsort(-logits)[:5]]
    nats = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose([one for _, one in told.nats], nats[[token for token, _ in told.nats]], atol=1e-5)
    assert not any(isinstance(part, np.ndarray) for part in told)


def test_stream_keeps_nothing_of_what_it_told():
    options = {"model": "tiny", "options": Generation(), "prompts": ("x",), "logprobs": 5}
    record = Record("a", 5, None, None, 1, 1, 1.0, 1.0)
    for stream in (True, False):
        answer = Answer(Wanted(stream=stream, **options), None, prompt_tokens=1)
        pieces = [answer.take(Told(0, record, ((5, -1.0), (6, -2.0)))) for _ in range(10)]
        (choice,) = answer._choices
        assert [len(kept) for kept in (choice.text, choice.tokens, choice.logprobs)] == [0 if stream else 10] * 3
        assert answer.usage["completion_tokens"] == 10
        assert pieces[-1]["choices"][0]["logprobs"]["text_offset"] == [9]
