"""Saved states of strangers: a tensor, a fact or bytes changed; half of them with the right digest."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

import dijiang
from dijiang.commands.state import _digest_free, _facts
from dijiang.runtime.model import Model
from dijiang.runtime.options import Generation
from dijiang.runtime.snapshot import Snapshot, _digest, _read
from dijiang.runtime.state import State
from dijiang.runtime.witness import take, verify
from tests.fuzz import bundles
from tests.fuzz.bundles import tried
from tests.fuzz.grammar import Case, value
from tests.fuzz.trees import bytes_edit, edit_bytes, edit_tree, tree_edit

DTYPES = ("float16", "float64", "int32", "int64", "uint64", "uint8", "bool", "float32")
SHAPES = ([], [0], [1], [1, 64], [1, 1, 1, 1], [2, 2, 8, 8], [3, 32], [1, 10**6])
NUMBERS = (float("nan"), float("inf"), -1, 0, 300, 2**31, 1e38)


@cache
def model() -> Model:
    return dijiang.load(bundles.base("fp32"), threads=1)


@cache
def saved() -> bytes:
    """A state in the middle of a text."""
    state, options = model().new_state(), Generation(max_tokens=3, ignore_eos=True)
    list(model().generate("ab", state=state, **vars(options)))
    return take(model(), state, options).dump()


def warm() -> None:
    """What workers share: no session, whose threads end with a fork."""
    bundles.warm()


def draw_case(seed: int, number: int) -> Case:
    draw = random.Random(f"states {seed} {number}")
    kinds: dict[str, Any] = {
        "bytes": lambda: bytes_edit(draw),
        "header": lambda: tree_edit(draw),
        "fact": lambda: [draw.randrange(9), draw.choice([value(draw), "", "1", "-1", "[]", str(10**30)])],
        "json": lambda: [draw.choice(["seams", "note"]), tree_edit(draw)],
        "dtype": lambda: [draw.randrange(9), draw.choice(DTYPES)],
        "shape": lambda: [draw.randrange(9), draw.choice(SHAPES)],
        "number": lambda: [draw.randrange(9), draw.randrange(10**4), draw.choice(NUMBERS)],
        "drop": lambda: [draw.randrange(9)],
        "add": lambda: [draw.choice(["layer.2", "layer.99", "x", ""]), draw.choice(SHAPES)],
    }
    verb = draw.choice(list(kinds))
    edits = [kinds[verb]() for _ in range(draw.choice([1, 1, 2]))]
    return {"class": "states", "verb": verb, "right": draw.random() < 0.7, "edits": edits}


def changed(case: Case) -> bytes:
    """The bytes of a case's file."""
    data, verb = saved(), case["verb"]
    if verb == "bytes":
        for edit in case["edits"]:
            data = edit_bytes(data, edit)
        return data
    if verb == "header":
        length = int.from_bytes(data[:8], "little")
        text = edit_tree(json.loads(data[8 : 8 + length]), case["edits"][0]).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    metadata, tensors = _read(data, "")
    tensors = {name: np.array(tensor) for name, tensor in sorted(tensors.items())}
    for edit in case["edits"]:
        if verb == "fact":
            name = sorted(metadata)[edit[0] % len(metadata)]
            metadata[name] = edit[1] if isinstance(edit[1], str) else json.dumps(edit[1])
        elif verb == "json":
            try:
                metadata[edit[0]] = edit_tree(json.loads(metadata[edit[0]]), edit[1])
            except (ValueError, RecursionError):
                break
        elif verb == "add":
            tensors[edit[0]] = np.zeros(edit[1], np.float32)
        elif tensors:
            name = list(tensors)[edit[0] % len(tensors)]
            tensors = edited(tensors, name, verb, edit)
    metadata = {name: text.encode("utf-8", "replace").decode() for name, text in metadata.items()}
    if case["right"]:
        metadata["digest"] = _digest({n: t for n, t in metadata.items() if n != "digest"}, tensors)
    return save(tensors, metadata)


def edited(tensors: dict[str, np.ndarray], name: str, verb: str, edit: list[Any]) -> dict[str, np.ndarray]:
    """Tensors after an edit of one."""
    old = tensors[name]
    if verb == "drop":
        return {n: t for n, t in tensors.items() if n != name}
    with np.errstate(all="ignore"):
        if verb == "dtype":
            return tensors | {name: old.astype(edit[1])}
        if verb == "shape":
            return tensors | {name: np.ones(edit[1], old.dtype)}
        new = old.copy()
        if new.size:
            new.flat[edit[1] % new.size] = np.array(edit[2], np.float64).astype(new.dtype)
        return tensors | {name: new}


def attempt(case: Case, folder: Path) -> str:
    """Read it, show it, prove it, and go on from it."""
    file = folder / "state"
    file.write_bytes(changed(case))

    def run() -> None:
        kept = Snapshot.load(file)
        json.dumps(_facts(kept))
        _digest_free(kept)
        state = State.of(kept)
        verify(model(), Snapshot.load(file))
        list(model().generate(None, state=state, max_tokens=2))
        model().forward([[1]], state)

    return tried(run, folder)
