"""Bundles of strangers: a file changed, every hash right."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import dijiang
from dijiang.bundle.manifest import DATA, MANIFEST
from dijiang.bundle.opened import open_bundle
from tests.conftest import signed
from tests.fuzz.folders import build
from tests.fuzz.grammar import Case
from tests.fuzz.trees import bytes_edit, edit_bytes, edit_tree, tree_edit

PRECISIONS = ("fp32", "int8")
TOKENIZER = "tokenizer.json"
#: What is changed, and how it is drawn.
PARTS = {"manifest": tree_edit, "graph": bytes_edit, "tokenizer": tree_edit, "data": bytes_edit, "text": bytes_edit}


@cache
def base(precision: str) -> Path:
    """A bundle of a small model, made once in a process and those that it forks."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-bundle-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    plain = {"family": "gpt_neox", "verb": "export", "layout": "safetensors", "edits": [], "merges": False}
    build(plain, folder / "checkpoint")
    options = {"verify": False, "calibration_tokens": 0, "precision": precision}
    return dijiang.export(folder / "checkpoint", folder / "bundle", **options).path


def warm() -> None:
    """What workers share."""
    for precision in PRECISIONS:
        base(precision)


def draw_case(seed: int, number: int) -> Case:
    draw = random.Random(f"bundles {seed} {number}")
    part = draw.choice(["manifest", "manifest", "manifest", "graph", "graph", "tokenizer", "data", "text"])
    edits = [PARTS[part](draw) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    facts = {"verb": part, "precision": draw.choice(PRECISIONS), "which": draw.randrange(4), "edits": edits}
    return {"class": "bundles"} | facts


def attempt(case: Case, folder: Path) -> str:
    """Open, load and generate; nothing in the bundle may change."""
    bundle = Path(shutil.copytree(base(case["precision"]), folder / "bundle"))
    graphs = sorted(bundle.glob("*.onnx"))
    files = {"manifest": bundle / MANIFEST, "graph": graphs[case["which"] % len(graphs)], "data": bundle / DATA}
    file = files.get(case["verb"], bundle / TOKENIZER)
    signed(bundle)  # without the digest, by which all else would go unseen
    data = file.read_bytes()
    for edit in case["edits"]:
        if case["verb"] in ("manifest", "tokenizer"):
            try:
                tree = json.loads(data)
            except (ValueError, RecursionError):
                break
            data = edit_tree(tree, edit).encode()
        else:
            data = edit_bytes(data, edit)
    file.write_bytes(data)
    if case["verb"] != "manifest":
        signed(bundle, file)

    def run() -> None:
        opened = open_bundle(bundle)
        graph = list(opened.manifest.graphs)[case["which"] % len(opened.manifest.graphs)]
        model = dijiang.load(bundle, threads=1, graph=graph)
        _ = opened.sampling, opened.parity, opened.passed
        list(model.generate("ab", max_tokens=2))
        model.forward([[1, 2], [3, 4]], model.new_state(2))

    return tried(run, folder)


def tried(run: Callable[[], None], folder: Path) -> str:
    """`runs`, or the error of ours in one line; AssertionError if anything in the folder was written."""
    before = contents(folder)
    try:
        run()
    except dijiang.DijiangError as error:
        one_line(error)
        return type(error).__name__
    finally:
        assert contents(folder) == before, "something was written"
    return "runs"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of everything there."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def one_line(error: Exception) -> None:
    """AssertionError unless a message is one line of a sane length."""
    line = str(error)
    assert line.splitlines() == [line.strip()], f"not one line: {line!r}"
    assert len(line) < 3000, f"a line of {len(line)} characters: {line[:200]}"
