"""One page of a browser, as tests use it. tests/chromium.py and tests/firefox.py say how a browser is asked."""

import json
import time

#: Seconds that anything may take.
PATIENCE = 20


class Tab:
    """What is the same in every browser; `run(code)` gives the value of an expression, and awaits a promise."""

    def evaluate(self, function, argument=None):
        """What a function of JavaScript makes of an argument; both are JSON."""
        return self.run(f"({function})({json.dumps(argument)})")

    def until(self, code):
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"!!({code})"):
            assert time.monotonic() < end, f"{code}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def click(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
