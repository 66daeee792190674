"""Firefox without a driver of its own: WebDriver BiDi over a websocket.

https://w3c.github.io/webdriver-bidi: JSON objects, each a message of a websocket.
"""

import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress

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
        from websockets.sync.client import connect  # in the environment of the browsers' tests

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=os.environ | environment, **quiet)
        address = f"ws://127.0.0.1:{self._port(profile / 'WebDriverBiDiServer.json')}/session"
        self._open = ExitStack()
        self._socket = self._open.enter_context(connect(address, max_size=None, ping_interval=None, proxy=None))
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
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            found = json.loads(self._socket.recv(LONG))
            if found.get("id") == self._count:
                assert found["type"] == "success", (method, found["error"], found["message"])
                return found["result"]
            self.events.append(found)

    def close(self):
        self._open.close()
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
