"""Firefox without a driver of its own: WebDriver BiDi over a websocket.

https://w3c.github.io/webdriver-bidi: JSON objects, each a message of a websocket (RFC 6455).
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress

from tests.tab import PATIENCE, Tab

PROGRAM = shutil.which("firefox-esr") or shutil.which("firefox")
#: With AVX-512 the C library does not clean the upper halves of registers, and Firefox mixes SSE and AVX. On some
#: servers both then take 100 times as long, wherever floats are computed: without WebAssembly, too.
TUNABLES = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512VL"}
#: Seconds that a script may take.
LONG = 120
#: What Firefox 140 itself writes down sometimes, on a page with a script that runs before its own.
OWN = 'Error: Permission denied to access property "length"'


class Firefox:
    """A browser: `call` a method of it; `events` wait to be read. `preferences`: name -> value, of about:config."""

    def __init__(self, profile, preferences=None, environment=TUNABLES):
        lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in (preferences or {}).items()]
        (profile / "user.js").write_text("".join(lines))
        command = [PROGRAM, "--headless", "--no-remote", "--remote-debugging-port=0", "--profile", str(profile)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=os.environ | environment, **quiet)
        self._socket = Socket(self._port(profile / "WebDriverBiDiServer.json"))
        self._count, self.events = 0, []
        self.version = self.call("session.new", capabilities={})["capabilities"]["browserVersion"]
        self.call("session.subscribe", events=["log.entryAdded"])

    def _port(self, file):
        """The port that the browser writes down when it listens."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self._process.poll() is None, f"{PROGRAM} has ended: {self._process.returncode}"
            with suppress(OSError, json.JSONDecodeError):
                return json.loads(file.read_text())["ws_port"]
            time.sleep(0.02)
        raise AssertionError(f"{PROGRAM} does not listen")

    def call(self, method, **parameters):
        """The result of a method."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}).encode())
        while True:
            found = json.loads(self._socket.receive())
            if found.get("id") == self._count:
                assert found["type"] == "success", (method, found["error"], found["message"])
                return found["result"]
            self.events.append(found)

    def close(self):
        self._socket.close()
        self._process.kill()  # nobody needs the profile: leaving it in order takes seconds
        self._process.wait(PATIENCE)

    @contextmanager
    def tab(self):
        """A page of a browser that knows nothing yet."""
        context = self.call("browser.createUserContext")["userContext"]
        page = self.call("browsingContext.create", type="tab", userContext=context)["context"]
        try:
            yield FirefoxTab(self, page)
        finally:
            self.call("browser.removeUserContext", userContext=context)


class FirefoxTab(Tab):
    """One page."""

    def __init__(self, browser, page):
        self.browser, self._page = browser, page

    def run(self, code):
        # An expression of JSON: what the protocol itself gives names the type of every number.
        asked = {"expression": f"(async () => JSON.stringify(await ({code})))()", "awaitPromise": True}
        found = self.browser.call("script.evaluate", target={"context": self._page}, **asked)
        assert found["type"] == "success", (code, found.get("exceptionDetails", {}).get("text"))
        return json.loads(found["result"].get("value", "null"))

    def goto(self, address):
        self.browser.call("browsingContext.navigate", context=self._page, url=address, wait="complete")

    def reload(self):
        self.browser.call("browsingContext.reload", context=self._page, wait="complete")

    def before_each(self, code):
        """Run code in every page, before its own."""
        declaration = f"() => {{ {code} }}"
        self.browser.call("script.addPreloadScript", functionDeclaration=declaration, contexts=[self._page])

    def errors(self):
        """Errors that nothing caught; the events are forgotten."""
        found = [event["params"] for event in self.browser.events if event.get("method") == "log.entryAdded"]
        self.browser.events.clear()
        texts = [entry["text"] for entry in found if (entry["type"], entry["level"]) == ("javascript", "error")]
        return [text for text in texts if text != OWN]


class Socket:
    """A websocket of this machine: whole messages of text, each way."""

    def __init__(self, port):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=LONG)
        self._from = self._socket.makefile("rb")
        asked = {
            "Host": f"127.0.0.1:{port}",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        }
        headers = "".join(f"{name}: {value}\r\n" for name, value in asked.items())
        self._socket.sendall(f"GET /session HTTP/1.1\r\n{headers}\r\n".encode())
        status = self._from.readline()
        assert b" 101 " in status, status
        while self._from.readline().strip():
            pass

    def send(self, data):
        size = len(data)
        width = 0 if size < 126 else 2 if size < 1 << 16 else 8
        length = [size] if not width else [126 if width == 2 else 127, *size.to_bytes(width, "big")]
        mask = os.urandom(4)
        stretched = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(data, "big") ^ int.from_bytes(stretched, "big")).to_bytes(size, "big")
        self._socket.sendall(bytes([0x81, 0x80 | length[0], *length[1:]]) + mask + masked)

    def receive(self):
        message = b""
        while True:
            kind, size = self._read(2)
            if size >= 126:
                size = int.from_bytes(self._read(2 if size == 126 else 8), "big")
            part = self._read(size)
            assert kind & 15 in (0, 1), "the browser has ended"
            message += part
            if kind & 0x80:
                return message

    def _read(self, size):
        data = self._from.read(size)
        assert len(data) == size, "the browser has ended"
        return data

    def close(self):
        self._from.close()
        self._socket.close()
