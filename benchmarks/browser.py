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
#: Sides in the browser: options of `Model.load`, and how many times fewer tokens of them are timed.
BROWSER: dict[str, tuple[dict[str, Any], int]] = {
    "browser": ({"provider": "cpu", "builds": ["core-relaxed.wasm"]}, 1),
    "browser, plain SIMD": ({"provider": "cpu", "builds": ["core.wasm"]}, 1),
    "onnxruntime-web": ({"provider": "wasm", "threads": 1}, 10),
}
LOAD = """async ([name, options]) => {
  const { Model } = await import("./dijiang.js");
  const model = await Model.load(location.origin + "/bundle/", options);
  (globalThis.sides ??= {})[name] = { model, state: model.newState() };
}"""
TURN = """async ([name, prompt, count]) => {
  const { model, state } = sides[name];
  let made = 0;
  const began = performance.now();
  for await (const _ of model.generate(prompt, { state, maxTokens: count, onToken: () => made++ }));
  return (performance.now() - began) / made;
}"""


def in_browser(page: Page, name: str) -> Callable[[], float]:
    """A turn of a side in the browser: milliseconds a token."""
    options, part = BROWSER[name]
    page.evaluate(LOAD, [name, options])
    return lambda: float(page.evaluate(TURN, [name, [1], TOKENS // part]))


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


def measured(bundle: Path, precision: str) -> dict[str, Any]:
    """All sides of a bundle, in turns."""
    sys.path.insert(0, str(WEB))
    from serve import handler_for

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(bundle))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        sides = {"native": here(bundle)} | {name: in_browser(page, name) for name in BROWSER}
        found: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(WARM + TURNS):
            for name, run in sides.items():
                taken = run()
                if turn >= WARM:
                    found[name].append(taken)
        version = browser.version
        browser.close()
    server.shutdown()
    server.server_close()
    rows = {}
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times, found["native"], strict=True)]
        rows[name] = {
            key: [round(f(values), 2) for f in (median, min, max)]
            for key, values in (("ms", times), ("times native", ratios))
        }
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
