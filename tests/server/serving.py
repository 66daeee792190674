"""A server in a thread of the tests, on loopback."""

import json
import socket
import threading
import time
from contextlib import closing, contextmanager

import uvicorn

from dijiang.server.connections import patient_protocol
from dijiang.server.process import build
from dijiang.server.settings import Serving

KEY = "k" * 40
PROMPT = "def main("


class Running:
    """A running server: `port`, `server` and plain requests to it."""

    def __init__(self, server, port):
        self.server, self.port = server, port
        self.url = f"http://127.0.0.1:{port}/v1"

    def connect(self):
        return closing(socket.create_connection(("127.0.0.1", self.port), timeout=20))

    def raw(self, data):
        """What comes back for bytes, until the connection ends."""
        with self.connect() as sock:
            sock.sendall(data)
            found = b""
            while piece := sock.recv(1 << 16):
                found += piece
        return found

    def ask(self, path, body=None, method=None, headers=()):
        """(status, headers, JSON or text) of one request; body: a value for JSON, or bytes."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            "Connection: close",
            f"Content-Length: {len(data)}",
            *headers,
        ]
        head, _, content = self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + data).partition(b"\r\n\r\n")
        status, *fields = head.decode().split("\r\n")
        found = dict(field.lower().split(": ", 1) for field in fields)
        if found.get("transfer-encoding") == "chunked":
            content = unchunked(content)
        value = json.loads(content) if found.get("content-type") == "application/json" else content.decode()
        return int(status.split()[1]), found, value

    def idle(self, seconds=5):
        """Whether nothing is on its way, within that time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not any(h.load or h.batcher.scheduler.busy for h in self.server.models.values()):
                return True
            time.sleep(0.01)
        return False


def unchunked(content):
    found = b""
    while content:
        size, _, rest = content.partition(b"\r\n")
        count = int(size, 16)
        found, content = found + rest[:count], rest[count + 2 :]
    return found


def events(text):
    """The JSON of each piece of a stream."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found.pop() == "[DONE]"
    return [json.loads(line) for line in found]


@contextmanager
def running(models, *, api_key=None, seal_key=None, buffer=None, **options):
    """A server of models by name; buffer: bytes that wait in the system for a client that does not read."""
    settings = Serving.of(options)
    server = build(models, settings, api_key=api_key, seal_key=seal_key)
    listening = socket.create_server(("127.0.0.1", 0))
    if buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    config = uvicorn.Config(
        server.app(),
        http=patient_protocol(settings.patience, server.metrics.ended),
        timeout_keep_alive=settings.keep_alive,
        ws="none",
        log_config=None,
        access_log=False,
    )
    process = uvicorn.Server(config)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not process.started:
            time.sleep(0.01)
        yield Running(server, listening.getsockname()[1])
    finally:
        process.should_exit = True
        thread.join()
        listening.close()


def text_of(model, prompt, **options):
    options = {"top_k": 50} | options  # its authors' choice
    return "".join(r.text for r in model.generate(prompt, **options))
