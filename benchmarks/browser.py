"""Milliseconds a token in browsers and of the native graph with one thread, in turns.

PYTHONPATH=. python benchmarks/browser.py .steps -o report.json     (in the environment of `make ecosystem-browser`)

.steps: where the bundle of the shape is, or is made, with random weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from bundles import Place
from reports import tell

import dijiang
from dijiang.machine.describe import describe_machine
from tests.chromium import Chromium
from tests.firefox import Firefox
from tests.tab import Tab

WEB = Path(__file__).parent.parent / "web"
SHAPE = "pythia-70m"
#: Tokens of each turn, turns of a side, and those before that are not counted: the browser compiles meanwhile.
TOKENS, TURNS, WARM = 40, 15, 5
OURS, PLAIN = {"provider": "cpu"}, {"provider": "cpu", "builds": ["core.wasm"]}
OTHER = {"provider": "wasm", "threads": 1}


def chromium(*flags: str) -> Callable[[Path], Any]:
    """How Chromium is started in a folder."""
    return lambda profile: Chromium(profile, *flags)


#: Sides of a browser: how it is started, options of `Model.load`, how many times fewer tokens of them are timed.
SIDES: dict[str, dict[str, tuple[Callable[[Path], Any], dict[str, Any], int]]] = {
    "chromium": {
        "ours": (chromium(), OURS, 1),
        "ours, no AVX-VNNI": (chromium("--js-flags=--no-enable-avx-vnni"), OURS, 1),
        "plain SIMD": (chromium(), PLAIN, 1),
        "onnxruntime-web": (chromium(), OTHER, 10),
    },
    "firefox": {
        "ours": (Firefox, OURS, 1),
        "onnxruntime-web": (Firefox, OTHER, 10),
    },
}
LOAD = """async (options) => {
  const { Model } = await import("./dijiang.js");
  globalThis.model = await Model.load(location.origin + "/bundle/", options);
  globalThis.state = model.newState();
}"""
TURN = """async ([prompt, count]) => {
  let made = 0;
  const began = performance.now();
  for await (const _ of model.generate(prompt, { state, maxTokens: count, onToken: () => made++ }));
  return (performance.now() - began) / made;
}"""


def in_browser(tab: Tab, options: dict[str, Any], tokens: int) -> Callable[[], float]:
    """A turn of a side in the browser: milliseconds a token."""
    tab.evaluate(LOAD, options)
    return lambda: float(tab.evaluate(TURN, [[1], tokens]))


def here(path: Path) -> Callable[[], float]:
    """A turn of the native graph with one thread."""
    model = dijiang.load(path, graph="native", threads=1)
    state = model.new_state()

    def turn() -> float:
        began = time.perf_counter()
        for _ in model.generate([1], state=state, max_tokens=TOKENS, ignore_eos=True):
            pass
        return 1e3 * (time.perf_counter() - began) / TOKENS

    return turn


def summary(values: list[float]) -> list[float]:
    return [round(f(values), 2) for f in (median, min, max)]


def measured(bundle: Path, precision: str, browser: str) -> dict[str, Any]:
    """Each side in the browser and the native graph, in turns; a browser of its own for each side."""
    sys.path.insert(0, str(WEB))
    from serve import handler_for

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(bundle))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    native, rows = here(bundle), {}
    for name, (started, options, fewer) in SIDES[browser].items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            program = started(Path(profile))
            with program.tab() as tab:
                tab.goto(f"http://127.0.0.1:{server.server_port}/")
                side = in_browser(tab, options, TOKENS // fewer)
                pairs = [(native(), side()) for _ in range(WARM + TURNS)][WARM:]
            version = program.version
            program.close()
        rows[name] = {
            "native ms": summary([ours for ours, _ in pairs]),
            "ms": summary([theirs for _, theirs in pairs]),
            "times native": summary([theirs / ours for ours, theirs in pairs]),
        }
    server.shutdown()
    server.server_close()
    return {"precision": precision, "browser": f"{browser} {version}", "median, lowest, highest": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--browser", choices=SIDES, action="append", help="one of them; none: all")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    rows = [
        measured(Place(given.cache, SHAPE, precision, "cpu").bundle, precision, browser)
        for browser in given.browser or SIDES
        for precision in ("int8", "int4")
    ]
    tell({"machine": describe_machine(), "shape": SHAPE, "rows": rows}, given.output)


if __name__ == "__main__":
    main()
