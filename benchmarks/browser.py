"""Milliseconds a token in Chromium and of the native graph with one thread, in turns.

python benchmarks/browser.py .steps -o report.json     (in the environment of `make ecosystem-browser`)

.steps: where the bundle of the shape is, or is made, with random weights.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from bundles import Place
from playwright.sync_api import Page, sync_playwright
from reports import tell

import dijiang
from dijiang.machine.describe import describe_machine

WEB = Path(__file__).parent.parent / "web"
SHAPE = "pythia-70m"
#: Tokens of each turn, turns of a side, and those before that are not counted: the browser compiles meanwhile.
TOKENS, TURNS, WARM = 40, 15, 5
#: Sides in the browser: options of `Model.load`, how many times fewer tokens of them are timed, flags of V8.
BROWSER: dict[str, tuple[dict[str, Any], int, str]] = {
    "browser": ({"provider": "cpu"}, 1, ""),
    "browser, no AVX-VNNI": ({"provider": "cpu"}, 1, "--no-enable-avx-vnni"),
    "browser, plain SIMD": ({"provider": "cpu", "builds": ["core.wasm"]}, 1, ""),
    "onnxruntime-web": ({"provider": "wasm", "threads": 1}, 10, ""),
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


def in_browser(page: Page, options: dict[str, Any], tokens: int) -> Callable[[], float]:
    """A turn of a side in the browser: milliseconds a token."""
    page.evaluate(LOAD, options)
    return lambda: float(page.evaluate(TURN, [[1], tokens]))


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


def measured(bundle: Path, precision: str) -> dict[str, Any]:
    """Each side in the browser and the native graph, in turns; a browser of its own for each side."""
    sys.path.insert(0, str(WEB))
    from serve import handler_for

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(bundle))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    native, rows = here(bundle), {}
    with sync_playwright() as playwright:
        for name, (options, fewer, flags) in BROWSER.items():
            arguments = ["--no-sandbox", f"--js-flags={flags}"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            side = in_browser(page, options, TOKENS // fewer)
            pairs = [(native(), side()) for _ in range(WARM + TURNS)][WARM:]
            rows[name] = {
                "native ms": summary([ours for ours, _ in pairs]),
                "ms": summary([theirs for _, theirs in pairs]),
                "times native": summary([theirs / ours for ours, theirs in pairs]),
            }
            version = browser.version
            browser.close()
    server.shutdown()
    server.server_close()
    return {"precision": precision, "chromium": version, "median, lowest, highest": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    rows = [measured(Place(given.cache, SHAPE, name, "cpu").bundle, name) for name in ("int8", "int4")]
    tell({"machine": describe_machine(), "shape": SHAPE, "rows": rows}, given.output)


if __name__ == "__main__":
    main()
