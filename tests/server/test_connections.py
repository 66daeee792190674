"""How connections end, and what the server does when others touch its files."""

import http.client
import json
import os
import shutil
import socket
import threading
import time

import pytest

import dijiang
from dijiang.runtime.state_folder import StateFolder
from dijiang.server.conversations import Conversations
from dijiang.server.process import _listening
from dijiang.server.settings import Serving
from tests.server.serving import PROMPT, running

LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "n": 4, "logprobs": 20, "ignore_eos": True, "seed": 1}


def sent(sock, body, path="/v1/completions"):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)


def counted(server, name, **labels):
    """A figure of /metrics; 0 where it is not there."""
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    wanted = f"{name}{{{inner}}}" if inner else name
    lines = dict(line.rsplit(" ", 1) for line in server.ask("/metrics")[2].splitlines() if not line.startswith("#"))
    return float(lines.get(wanted, 0))


def test_client_that_reads_steadily_gets_all_however_long_it_takes(models, caplog):
    """Three times the patience; and nothing is left to go wrong after it."""
    with running(models, patience=1.0, keep_alive=0.2, buffer=8192) as server, server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sent(sock, LONG)
        found = sock.recv(1)
        started = time.monotonic()
        while not (head := found.partition(b"\r\n\r\n"))[1]:
            found += sock.recv(4096)
        length = int(head[0].lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        pace = 3.5 / length
        while len(found) < len(head[0]) + 4 + length:
            piece = sock.recv(1 << 14)
            assert piece, f"{len(found)} of {length} bytes after {time.monotonic() - started:.1f} s"
            found += piece
            time.sleep(len(piece) * pace)
        assert time.monotonic() - started > 3
        assert sock.recv(1) == b""  # it was idle
        time.sleep(1.5)
        assert counted(server, "dijiang_connections_ended_total", reason="unread") == 0
    assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


def test_why_the_server_ended_a_connection_is_counted(models):
    with running(models, patience=0.3, buffer=8192) as server:
        assert server.raw(b"\x00\x01 nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        assert server.raw(b"") == b""
        with server.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sent(sock, LONG)
            end = time.monotonic() + 20
            while not counted(server, "dijiang_connections_ended_total", reason="unread"):
                assert time.monotonic() < end
        for reason in ("malformed", "silent", "unread"):
            assert counted(server, "dijiang_connections_ended_total", reason=reason) == 1, reason


@pytest.mark.parametrize("path", ["/v1/completions", "/nowhere"])
def test_who_sends_all_before_it_reads_is_told_why_it_is_refused(models, path):
    with running(models, max_body=10_000) as server:
        for _ in range(3):
            link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            link.request("POST", path, b"x" * (8 << 20))
            answer = link.getresponse()
            assert answer.status == (404 if path == "/nowhere" else 413)
            assert "error" in json.loads(answer.read())
            link.close()


def test_connection_rests_as_long_as_it_may(models):
    with running(models, patience=0.3, keep_alive=3.0) as server:
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for _ in range(2):
            link.request("GET", "/healthz")
            assert link.getresponse().read() == b'{"status":"ok"}'
            sock = link.sock
            time.sleep(0.8)
        assert link.sock is sock
        started = time.monotonic()
        assert sock.recv(1) == b""
        assert time.monotonic() - started < 10
        link.close()


def test_slash_at_the_end_leads_nowhere_else(served):
    """Behind a proxy it would lead to another scheme or path."""
    for path in ("/v1/completions/", "/metrics/"):
        status, headers, _ = served.ask(path, {"model": "tiny", "prompt": "x"})
        assert (status, "location" in headers) == (404, False)


def test_body_that_keeps_coming_may_take_longer_than_patience(models):
    data = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1, "user": "u" * 40_000}).encode()
    with running(models, patience=0.4) as server, server.connect() as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode())
        for start in range(0, len(data), 5000):
            sock.sendall(data[start : start + 5000])
            time.sleep(0.1)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_slow_disk_stops_nobody_else(models, tmp_path, monkeypatch):
    fsync = os.fsync

    def slow(descriptor):
        time.sleep(1)
        fsync(descriptor)

    folder = str(tmp_path)
    with running(models, conversations=0, conversation_folder=folder) as server:
        monkeypatch.setattr(os, "fsync", slow)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "store": True}
        with server.connect() as sock:
            for _ in range(10):  # pipelined: one after another
                sent(sock, body)
            waits = []
            for _ in range(20):
                started = time.monotonic()
                assert server.ask("/healthz")[0] == 200
                waits.append(time.monotonic() - started)
                time.sleep(0.05)
        assert max(waits) < 0.8
        monkeypatch.undo()


def test_bundle_that_is_written_over_is_no_longer_served(bundles, tmp_path):
    place = shutil.copytree(bundles / "tiny", tmp_path / "tiny")
    with running({"tiny": dijiang.load(place, threads=1)}) as server:
        body, data = {"model": "tiny", "prompt": "x", "max_tokens": 1}, place / "model.onnx.data"
        whole = data.read_bytes()
        os.replace(shutil.copy(data, tmp_path / "new"), data)  # so it is done
        assert (server.ask("/readyz")[0], server.ask("/v1/completions", body)[0]) == (200, 200)
        data.unlink()
        assert server.ask("/v1/completions", body)[0] == 200
        data.write_bytes(whole)
        assert server.ask("/readyz")[0] == 200
    with running({"tiny": dijiang.load(place, threads=1)}) as server:
        data.write_bytes(whole)
        for path, given in (("/readyz", None), ("/v1/completions", body)):
            status, _, found = server.ask(path, given)
            assert (status, found["error"]["message"]) == (
                503,
                "tiny: its bundle was written over; start the server again",
            )
        assert server.ask("/healthz")[0] == 200


def test_end_that_comes_while_states_are_written_loses_none(model, tmp_path):
    folder = StateFolder(tmp_path, 1 << 30)
    kept, names, later = Conversations(8, folder=folder), [f"cmpl-{n:032x}" for n in range(6)], folder.save_later
    begun = threading.Event()

    def slowly(name, state, **options):
        begun.set()
        time.sleep(0.05)
        return later(name, state, **options)

    folder.save_later = slowly
    for name in names:
        kept.store(name, model.new_state())
    flushing = threading.Thread(target=kept.flush)
    flushing.start()
    begun.wait()
    kept.close()
    flushing.join()
    assert sorted(file.stem for file in tmp_path.iterdir()) == names


def test_flush_writes_each_state_once(model, tmp_path):
    folder = StateFolder(tmp_path, 1 << 30)
    kept, names = Conversations(8, folder=folder), [f"cmpl-{number:032x}" for number in range(8)]
    for name in names[:5]:
        kept.store(name, model.new_state())
    kept.flush()
    saved, save = [], folder.save
    folder.save = lambda name, state: (saved.append(name), save(name, state))[1]
    for name in names[5:]:
        kept.store(name, model.new_state())
    kept.close()
    assert sorted(file.stem for file in tmp_path.iterdir()) == names
    assert set(names[5:]) <= set(saved)
    assert len(saved) <= 8


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
def test_small_pieces_of_an_answer_do_not_wait_for_each_other(host):
    """Nagle's algorithm, with a client that acknowledges late, took 40 ms of each request."""
    if host != "127.0.0.1" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with (
        _listening(Serving(host=host, port=0)) as listening,
        socket.create_connection(("::1" if ":" in host else host, listening.getsockname()[1])),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
