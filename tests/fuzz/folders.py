"""From a case to the folder of its checkpoint."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from dijiang.models.binding import ADDED
from tests.fuzz.grammar import CONFIG, CONFIGS, GENERATION, MERGES, SHAPE, TOKENIZER, VOCABULARY, Case
from tests.random_models import write
from tests.random_tokenizers import byte_level


@cache
def base(family: str) -> dict[str, np.ndarray]:
    """The tensors of the unharmed checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), SHAPE | CONFIGS[family])
        return load_file(Path(folder) / "model.safetensors")


@cache
def tokenizer() -> str:
    """A byte-level tokenizer of as many tokens as the models have."""
    return byte_level(prefix=False, size=SHAPE["vocab_size"]).to_str()


def build(case: Case, folder: Path) -> None:
    """Write the checkpoint of a case."""
    folder.mkdir()
    tensors = dict(base(case["family"]))
    if case["verb"] == "convert":
        tensors = {n: t for n, t in tensors.items() if not n.endswith(ADDED)}
    for one in case["edits"]:
        if one[0] in TENSOR_EDITS:
            tensors = TENSOR_EDITS[one[0]](tensors, *one[1:])
    (folder / CONFIG).write_text(json.dumps(SHAPE | CONFIGS[case["family"]]))
    if case["merges"]:
        model = json.loads(tokenizer())["model"]
        (folder / VOCABULARY).write_text(json.dumps(model["vocab"]))
        (folder / MERGES).write_text("".join(f"{first} {second}\n" for first, second in model["merges"]))
    else:
        (folder / TOKENIZER).write_text(tokenizer())
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.7}))
    wraps = [one[1] for one in case["edits"] if one[0] == "wrap"]
    write_tensors(folder, tensors, case["layout"], wraps)
    for one in case["edits"]:
        if one[0] in FILE_EDITS and (file := file_of(folder, one)) is not None:
            FILE_EDITS[one[0]](file, *one[2 if one[0] not in WEIGHTS_ONLY else 1 :])


def nth(names: Any, number: int) -> str:
    ordered = list(names)
    return ordered[number % len(ordered)] if ordered else ""


def renamed(tensors, number, name):
    old = nth(tensors, number)
    return {name if n == old else n: t for n, t in tensors.items()}


def changed(tensors, number, change):
    old = nth(tensors, number)
    return {n: change(t) if n == old else t for n, t in tensors.items()}


TENSOR_EDITS: dict[str, Callable[..., dict[str, Any]]] = {
    "name": renamed,
    "drop": lambda tensors, number: {n: t for n, t in tensors.items() if n != nth(tensors, number)},
    "add": lambda tensors, name, shape: tensors | {name: np.ones(shape, np.float32)},
    "dtype": lambda tensors, number, dtype: changed(tensors, number, lambda t: t.astype(numpy_dtype(dtype))),
    "shape": lambda tensors, number, shape: changed(tensors, number, lambda t: np.ones(shape, np.float32)),
    "fill": lambda tensors, number, number_in: changed(tensors, number, lambda t: np.full_like(t, number_in)),
    "prefix": lambda tensors, prefix: {prefix + n: t for n, t in tensors.items()},
}


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def as_torch(tensor: np.ndarray) -> torch.Tensor:
    if tensor.dtype.name in ("bfloat16", "float8_e4m3fn"):
        bits = torch.from_numpy(tensor.view(f"u{tensor.dtype.itemsize}").copy())
        return bits.view(getattr(torch, tensor.dtype.name))
    return torch.from_numpy(np.array(tensor))


def wrap(tensors: dict[str, torch.Tensor], kind: str) -> Any:
    """What people save beside, around or instead of a dict of tensors."""
    first = next(iter(tensors), "x")
    one = tensors.get(first, torch.ones(3))
    forms: dict[str, Callable[[], Any]] = {
        "state_dict": lambda: {"epoch": 3, "state_dict": tensors},
        "module": lambda: {"module": tensors, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        "two": lambda: {"model": tensors, "ema": tensors},
        "number": lambda: tensors | {"number": 3},
        "list": lambda: list(tensors.values()),
        "none": lambda: None,
        "sparse": lambda: tensors | {first: torch.ones(4, 4).to_sparse()},
        "quantized": lambda: tensors | {first: quantized()},
        "object": lambda: tensors | {first: Path("x")},
        "strided": lambda: tensors | {first: one.t().contiguous().t() if one.ndim == 2 else one.expand(one.shape)},
    }
    return forms[kind]()


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():  # deprecated, and in many files
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)


def write_tensors(folder: Path, tensors: dict[str, Any], layout: str, wraps: list[str]) -> None:
    single, index = "model.safetensors", "model.safetensors.index.json"
    if "bin" in layout:
        single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"

    def save(part: dict[str, Any], file: Path) -> None:
        if "bin" not in layout:
            save_file({n: np.ascontiguousarray(t) for n, t in part.items()}, file)
            return
        saved: Any = {n: as_torch(t) for n, t in part.items()}
        for kind in wraps[:1]:
            saved = wrap(saved, kind)
        torch.save(saved, file, _use_new_zipfile_serialization="legacy" not in layout)

    if "shards" not in layout:
        save(tensors, folder / single)
        return
    names, where = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"part-{number}.{single.split('.')[-1]}"
        save({n: tensors[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


WEIGHTS_ONLY = ("header", "length")


def file_of(folder: Path, one: list[Any]) -> Path | None:
    """The file that an edit is about; None: this layout has none."""
    name = "@weights" if one[0] in WEIGHTS_ONLY else one[1]
    patterns = {"@weights": ("*.safetensors", "*.bin"), "@index": ("*.index.json",)}.get(name, (name,))
    found = [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]
    return found[0] if found else None


def edit_json(file: Path, change: Callable[[Any], None]) -> None:
    """Change what a file of JSON holds, unless an earlier edit left none."""
    try:
        whole = json.loads(file.read_text())
        change(whole)
        file.write_text(json.dumps(whole))
    except (ValueError, RecursionError):
        return


def set_json(file: Path, path: list[Any], new: Any) -> None:
    def change(at: Any) -> None:
        for step in path[:-1]:
            at = at.get(step) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at[path[-1] if isinstance(path[-1], str) else nth(at, path[-1])] = new

    edit_json(file, change)


def unset_json(file: Path, number: int) -> None:
    edit_json(file, lambda whole: whole.pop(nth(whole, number), None))


def raw_json(file: Path, kind: str) -> None:
    """What json.dumps would not write."""
    text = file.read_text(errors="replace").rstrip()
    tails = {"digits": "9" * 5001, "lists": "[" * 5000 + "]" * 5000, "objects": '{"a":' * 5000 + "1" + "}" * 5000}
    tails |= {"1e400": "1e400", "-Infinity": "-Infinity", "twice": '1, "model_type": "opt"', "nothing": ""}
    if kind == "bytes":
        file.write_bytes(text.encode()[:-1] + b', "x": "\xff\xfe"}')
    else:
        file.write_text(f'{text[:-1]}, "hidden_size": {tails[kind]}}}')


def put(file: Path, at: int, new: str, *, instead: bool) -> None:
    data = bytearray(file.read_bytes())
    at = at % (len(data) + 1)
    data[at : at + (len(new) // 2 if instead else 0)] = bytes.fromhex(new[: len(new) // 2 * 2])
    file.write_bytes(data)


def cut(file: Path, at: int) -> None:
    os.truncate(file, at % (file.stat().st_size + 1))


def header(file: Path, number: int, key: str, new: Any) -> None:
    """Change an entry of a safetensors header."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if file.suffix != ".safetensors" or length > len(data):
        return
    try:
        entries = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return
    name = nth(entries, number)
    if key and isinstance(entries.get(name), dict):
        entries[name][key] = new
    else:
        entries[name] = new
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def length(file: Path, new: int) -> None:
    data = file.read_bytes()
    file.write_bytes(new.to_bytes(8, "little") + data[8:])


def other(file: Path, kind: str) -> None:
    """Something else in the place of a file."""
    file.unlink()
    made: dict[str, Callable[[], Any]] = {
        "directory": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
        "loop": lambda: file.symlink_to(file.name),
        "nowhere": lambda: file.symlink_to("gone"),
        "zero": lambda: file.symlink_to("/dev/zero"),
        "empty": file.touch,
        "pointer": lambda: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "unreadable": lambda: file.touch(0),
    }
    made[kind]()


FILE_EDITS: dict[str, Callable[..., None]] = {
    "set": set_json,
    "unset": unset_json,
    "raw": raw_json,
    "bytes": lambda file, at, new: put(file, at, new, instead=True),
    "insert": lambda file, at, new: put(file, at, new, instead=False),
    "cut": cut,
    "remove": lambda file: file.unlink(),
    "other": other,
    "header": header,
    "length": length,
}
