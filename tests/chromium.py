"""Chromium without a driver of its own: its DevTools protocol over a pipe.

https://chromedevtools.github.io/devtools-protocol: JSON objects, each ended by a zero byte, on descriptors 3 and 4.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

from tests.tab import PATIENCE, Tab

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: Name of a key -> its code, and what it writes.
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, ""), "ArrowDown": (40, ""), "ArrowUp": (38, "")}
SHIFT = 8


class Chromium:
    """A browser: `call` a method of it, or of a page; `events` of pages wait to be read. `flags`: more of them."""

    def __init__(self, profile, *flags):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # Through descriptors above 4, so that none is taken by the other first; dash knows no such numbers.
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (to_read, to_write)]
        shell = ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash"]
        command = [
            *shell,
            PROGRAM,
            *FLAGS,
            *flags,
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self._process = subprocess.Popen(command, pass_fds=high, stderr=subprocess.DEVNULL)
        for one in (to_read, to_write, *high):
            os.close(one)
        self._rest, self._count, self.events = b"", 0, []
        self.version = self.call("Browser.getVersion")["product"].split("/")[1]

    def call(self, method, session=None, **parameters):
        """The result of a method."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            found = self._read()
            if found.get("id") == self._count:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.events.append(found)

    def _read(self):
        while b"\0" not in self._rest:
            piece = os.read(self._from, 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def close(self):
        self.call("Browser.close")
        self._process.wait(PATIENCE)
        os.close(self._to)
        os.close(self._from)

    @contextmanager
    def tab(self, *, width=1280, height=900, dark=False):
        """A page of a browser that knows nothing yet."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        found = ChromiumTab(self, session)
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            found.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        found.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        found.call("Emulation.setDeviceMetricsOverride", **size)
        try:
            yield found
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)


class ChromiumTab(Tab):
    """One page."""

    def __init__(self, browser, session):
        self.browser, self._session = browser, session

    def call(self, method, **parameters):
        return self.browser.call(method, self._session, **parameters)

    def run(self, code):
        """The value of an expression of JavaScript; a promise's is awaited."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (code, found["exceptionDetails"])
        return found["result"].get("value")

    def goto(self, address):
        self.call("Page.navigate", url=address)
        self.until(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")

    def reload(self):
        self.run("globalThis.old = true")
        self.call("Page.reload")
        self.until("!globalThis.old && document.readyState === 'complete'")

    def before_each(self, code):
        """Run code in every page, before its own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=code)

    def press(self, key, *, shift=False):
        code, text = KEYS[key]
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **facts)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def write(self, text):
        self.call("Input.insertText", text=text)

    def press_until(self, key, code):
        """Press a key until an expression is true, as often as there may be things on the page."""
        for _ in range(60):
            if self.run(code):
                return
            self.press(key)
        raise AssertionError(f"{key} never leads to {code}")

    def names(self):
        """(role, accessible name) of all that can have the focus, as a screen reader is told."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        held = [n for n in nodes if any(p["name"] == "focusable" for p in n.get("properties", ()))]
        return [(n["role"]["value"], n["name"]["value"]) for n in held if not n["ignored"]]

    def picture(self, file):
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def complaints(self):
        """What was written to the console, and errors that nothing caught; the events are forgotten."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        found = [e["params"] for e in self.browser.events if e.get("method") in kinds]
        self.browser.events.clear()
        return found

    def errors(self):
        """Errors that nothing caught; the events are forgotten."""
        return [found["exceptionDetails"] for found in self.complaints() if "exceptionDetails" in found]
