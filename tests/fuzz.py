"""Fuzzed checkpoints through `export` and `convert`: one line or a whole output, soon, in little memory.

    python -m tests.fuzz --cases 10000 --output benchmarks/results/fuzz.json

A case is data: a family, a verb, a layout of files and edits that a grammar drew. So it can be kept: what
was found and mended is in tests/corpus, and ordinary tests run it again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime  # noqa: F401  what a worker would import in its first case
import scipy.special  # noqa: F401
import torch
import torch._subclasses.fake_tensor
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.models.binding import ADDED
from dijiang.models.convert import convert
from dijiang.models.load import load_checkpoint
from dijiang.version import __version__
from tests.random_models import write
from tests.random_tokenizers import KINDS, sequence, streamed
from tests.random_tokenizers import tokenizer as tokenizer_of

#: A case may take so many seconds of a processor, and a resident set of so many megabytes.
SECONDS, MEGABYTES = 5, 1000
#: Seconds on the clock without an answer, where a case waits and does not work: a busy machine is slow.
WAIT = 60
#: A worker begins anew after so many cases, and may never have more than so many bytes.
CASES, LIMIT = 400, 6 << 30
SHAPE = {"hidden_size": 16, "vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"max_position_embeddings": 24, "eos_token_id": 0, "bos_token_id": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 12, "rotary_pct": 0.5, "hidden_act": "gelu"},
    "opt": {"model_type": "opt", "ffn_dim": 12, "word_embed_proj_dim": 16, "activation_function": "relu"},
    "llama": {"model_type": "llama", "intermediate_size": 12, "num_key_value_heads": 1, "hidden_act": "silu"},
}
LAYOUTS = ("safetensors", "safetensors", "shards", "bin", "bin shards", "legacy bin")
CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"

Case = dict[str, Any]
Draw = random.Random


# --- the grammar


def value(draw: Draw, depth: int = 0) -> Any:
    """Any value of JSON, of the kinds that break readers."""
    kinds: list[Callable[[], Any]] = [
        lambda: draw.choice([0, 1, -1, 2, 3, 7, 16, 300, 2**31, -(2**31), 2**63, 10**30, 10**9]),
        lambda: draw.choice([0.0, -0.0, 0.5, 1e-320, 1e308, -2.5, 1e6, float("nan"), float("inf")]),
        lambda: draw.choice(["", "a", "gelu", "linear", "llama3", "default", "1", "\0", "é\ud800", "x" * 300]),
        lambda: draw.choice(["../x", "/etc/passwd", "\x1b[31m", "true", "model.safetensors", "auto", "."]),
        lambda: draw.choice([True, False, None]),
    ]
    if depth < 3:
        kinds += [
            lambda: [value(draw, depth + 1) for _ in range(draw.randrange(4))],
            lambda: {draw.choice(KEYS): value(draw, depth + 1) for _ in range(draw.randrange(4))},
        ]
    return draw.choice(kinds)()


KEYS = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "ffn_dim", "max_position_embeddings", "word_embed_proj_dim", "head_dim", "model_type"),
    *("hidden_act", "activation_function", "rope_scaling", "rope_parameters", "rope_theta", "rotary_pct"),
    *("partial_rotary_factor", "rotary_emb_base", "original_max_position_embeddings", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "enable_bias", "do_layer_norm_before", "layer_norm_eps", "rms_norm_eps"),
    *("eos_token_id", "bos_token_id", "quantization_config", "torch_dtype", "dtype", "use_parallel_residual"),
    *("type", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "quant_method", "text_config"),
    *("layer_norm_elementwise_affine", "_remove_final_layer_norm", "architectures", "auto_map", ""),
)
SAMPLING = ("eos_token_id", "temperature", "top_p", "top_k", "do_sample")
MODEL_KEYS = ("type", "vocab", "merges", "byte_fallback")
STORED = ("F8_E4M3", "I64", "F32", "F4", "BOOL", "BF16")
TOKENIZER_KEYS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens", "model", "truncation")
PARTS = (
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b" * 1000},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "Split", "pattern": {"Regex": "(x|x)*y"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": [], "processors": []},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]},
    {"type": "Strip", "strip_left": True, "strip_right": True, "content": " ", "start": 1, "stop": 10**9},
    {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
    {"type": "WordLevel", "vocab": {"a": 2**32}, "unk_token": "b"},
    {"type": "None"},
)
RAW = ("digits", "lists", "objects", "1e400", "-Infinity", "nothing", "bytes", "twice")
BYTES = ("00", "ff", "7f", "80", "fffffffffffffff7f", "00000000000000ff", "7b7b7b7b", "ffffffff", "2e2e2f", "5d7d")
OTHERS = ("directory", "pipe", "loop", "nowhere", "zero", "empty", "pointer", "unreadable")
NAMES = ("lm_head.weight", "embed_out.weight", "x", "", "\x1b]0;x\x07", "n" * 300, "model.norm.weight")
SHAPES = ([], [0], [1], [16], [16, 16], [300, 16], [1, 1, 24, 1], [2, 3, 4])
DTYPES = ("float16", "float64", "bfloat16", "float8_e4m3fn", "int8", "int64", "bool", "complex64")
PREFIXES = ("module.", "_orig_mod.", "model.", "base_model.model.", "x.", "model.model.")
WRAPS = ("state_dict", "module", "two", "number", "list", "none", "sparse", "quantized", "object", "strided")


def edit(draw: Draw, layout: str) -> list[Any]:
    """One edit of a checkpoint."""
    files = [CONFIG, TOKENIZER, GENERATION, VOCABULARY, MERGES, "@weights", "@weights", "@index"]
    place = draw.choice([draw.randrange(64), draw.randrange(600), -draw.randrange(1, 400), draw.randrange(40_000)])
    file = draw.choice(files)
    one: list[Callable[[], list[Any]]] = [
        lambda: ["set", CONFIG, [draw.choice(KEYS)], value(draw)],
        lambda: ["set", CONFIG, [draw.choice(KEYS)], value(draw)],
        lambda: ["unset", CONFIG, draw.randrange(20)],
        lambda: ["raw", draw.choice([CONFIG, TOKENIZER, GENERATION, "@index"]), draw.choice(RAW)],
        lambda: [
            "set",
            GENERATION,
            [draw.choice(["eos_token_id", "temperature", "top_p", "do_sample"])],
            value(draw),
        ],
        lambda: ["set", "@index", ["weight_map", draw.randrange(30)], value(draw)],
        lambda: ["set", "@index", [draw.choice(["weight_map", "metadata"])], value(draw)],
        lambda: ["set", TOKENIZER, [draw.choice(TOKENIZER_KEYS)], draw.choice([value(draw), draw.choice(PARTS)])],
        lambda: [
            "set",
            TOKENIZER,
            ["model", draw.choice(["type", "vocab", "merges", "byte_fallback"])],
            value(draw),
        ],
        lambda: ["bytes", file, place, draw.choice(BYTES)],
        lambda: ["bytes", file, place, bytes([draw.randrange(256)]).hex()],
        lambda: ["insert", file, place, draw.choice(BYTES)],
        lambda: ["cut", file, place],
        lambda: ["remove", file],
        lambda: ["other", file, draw.choice(OTHERS)],
        lambda: ["header", draw.randrange(40), draw.choice(["dtype", "shape", "data_offsets", ""]), value(draw)],
        lambda: [
            "header",
            draw.randrange(40),
            "dtype",
            draw.choice(["F8_E4M3", "I64", "F32", "F4", "BOOL", "BF16"]),
        ],
        lambda: ["header", draw.randrange(40), "data_offsets", [draw.randrange(9000), draw.choice([0, 64, 2**62])]],
        lambda: ["length", draw.choice([0, 1, 8, 10**6, 2**32, 2**63, 2**64 - 1])],
        lambda: ["name", draw.randrange(40), draw.choice(NAMES)],
        lambda: ["drop", draw.randrange(40)],
        lambda: ["add", draw.choice(NAMES), draw.choice(SHAPES)],
        lambda: ["dtype", draw.randrange(40), draw.choice(DTYPES)],
        lambda: ["shape", draw.randrange(40), draw.choice(SHAPES)],
        lambda: ["fill", draw.randrange(40), draw.choice([float("nan"), float("inf"), 1e38, 0.0, -1.0])],
        lambda: ["prefix", draw.choice(PREFIXES)],
    ]
    if "bin" in layout:
        one += [lambda: ["wrap", draw.choice(WRAPS)]] * 3
    return draw.choice(one)()


def draw_case(seed: int, number: int) -> Case:
    """The case of a number; most have one edit, so that a reader gets far before it meets it."""
    draw = random.Random(f"{seed} {number}")
    layout = draw.choice(LAYOUTS)
    return {
        "family": draw.choice(list(CONFIGS)),
        "verb": draw.choice(["export", "convert"]),
        "layout": layout,
        "graph": draw.choice(["auto", "primitive"]),
        "precision": draw.choice(["fp32", "fp32", "fp16", "int8", "int4"]),
        "verify": draw.random() < 0.1,
        "merges": draw.random() < 0.2,
        "edits": [edit(draw, layout) for _ in range(draw.choice([0, 1, 1, 1, 1, 1, 2, 3]) or draw.randrange(2))],
    }


# --- from a case to a folder


@cache
def base(family: str) -> dict[str, np.ndarray]:
    """The tensors of the unharmed checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), SHAPE | CONFIGS[family])
        return load_file(Path(folder) / "model.safetensors")


@cache
def tokenizer() -> str:
    """A byte-level tokenizer of 300 tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    made.train_from_iterator(["def main(): return the other thing\n" * 20, "aaa bbb"], trainer)
    return made.to_str()


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


# --- running one


def attempt(case: Case, folder: Path) -> str:
    """Run a case in an empty folder: "written", or the class of the error; AssertionError: a finding."""
    build(case, folder / "checkpoint")
    area = folder / "area"
    area.mkdir()
    target = area / "target"
    options = {"graph": case["graph"], "precision": case["precision"], "verify": case["verify"]}
    if case["precision"] == "int4" and not case["verify"]:
        options["calibration_tokens"] = 0  # thousands of tokens are drawn else
    try:
        if case["verb"] == "export":
            dijiang.export(folder / "checkpoint", target, **options)
        else:
            convert(folder / "checkpoint", target)
    except dijiang.DijiangError as error:
        line = str(error)
        assert line.splitlines() == [line.strip()], f"not one line: {line!r}"
        assert len(line) < 3000, f"a line of {len(line)} characters: {line[:200]}"
        assert not list(area.iterdir()), f"left behind: {list(area.rglob('*'))}"
        return type(error).__name__
    assert [path.name for path in area.iterdir()] == ["target"], list(area.iterdir())
    if case["verb"] == "export":
        open_bundle(target)
    else:
        load_checkpoint(target)  # what convert accepts, export accepts
        dijiang.export(target, folder / "bundle", graph=case["graph"], verify=False)
    return "written"


def worker(pipe: Any, folder: Path) -> None:
    """Cases as they come; of each (outcome or None, what was found, processor seconds, largest resident set)."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("error")  # a warning is no line of ours either
    warnings.simplefilter("ignore", RuntimeWarning)  # sums of weights of 1e38
    while (case := pipe.recv()) is not None:
        place = Path(tempfile.mkdtemp(dir=folder))
        outcome, found, start = None, "", time.process_time()
        try:
            outcome = attempt(case, place)
        except BaseException:
            found = traceback.format_exc()[-1500:]
        seconds = time.process_time() - start
        shutil.rmtree(place, ignore_errors=True)
        pipe.send((outcome, found, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


class Worker:
    """A process that runs cases; a new one after a hang, a crash, or many."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, self.folder), daemon=True)
        with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads; these only wait
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()
        self.cases = 0

    def run(self, case: Case) -> tuple[str, str, float, int]:
        """(outcome, what was found or "", processor seconds, bytes)."""
        if self.cases >= CASES:
            self.end()
            self._begin()
        self.cases += 1
        self.pipe.send(case)
        try:
            answered = self.pipe.poll(WAIT)
            outcome, found, seconds, peak = self.pipe.recv() if answered else ("hang", "no answer", WAIT, 0)
        except EOFError:
            self.process.join()
            outcome, found, seconds, peak = "crash", f"the process ended with {self.process.exitcode}", 0, 0
        if outcome not in ("hang", "crash"):
            outcome = "finding" if found else outcome
            if not found and seconds > SECONDS:
                outcome, found = "hang", f"{seconds:.1f} s"
            if not found and peak > MEGABYTES * 10**6:
                outcome, found = "memory", f"{peak / 1e6:.0f} MB"
        if outcome in ("hang", "crash", "memory"):
            self.process.kill()
            self.process.join()
            self._begin()
        return outcome, found, seconds, peak

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def run_cases(
    cases: Iterator[tuple[int, Case]], say: Callable[[str], None] = lambda _: None, workers: int = 1
) -> dict[str, Any]:
    """Run cases, in so many processes side by side; the report."""
    outcomes: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    slowest, largest, lock = [0.0], [0], threading.Lock()

    def work(one: Worker) -> None:
        while True:
            with lock:
                number, case = next(cases, (0, None))
            if case is None:
                return
            outcome, found, seconds, peak = one.run(case)
            with lock:
                outcomes[f"{case['verb']}: {outcome}"] += 1
                slowest[0], largest[0] = max(slowest[0], seconds), max(largest[0], peak)
                if found:
                    findings.append({"number": number, "outcome": outcome, "found": found, "case": case})
                    say(json.dumps(findings[-1]))
                if outcomes.total() % 500 == 0:
                    say(f"{outcomes.total()} cases, {len(findings)} findings")

    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        made = [Worker(Path(name)) for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, made))
        for one in made:
            one.end()
    return {
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_seconds": round(slowest[0], 2),
        "largest_megabytes": round(largest[0] / 1e6),
        "findings": findings,
    }


def stream_texts(seed: int, cases: int) -> dict[str, Any]:
    """Random tokens of every kind of tokenizer: those whose streamed text is not their decoded text."""
    wrong = {}
    for kind in KINDS:
        draw = random.Random(f"{seed} {kind}")
        drawn = (sequence(kind, draw) for _ in range(cases))
        wrong[kind] = [ids for ids in drawn if streamed(kind, ids) != tokenizer_of(kind).decode(ids)]
    return {"sequences_of_each_kind": cases, "streamed_otherwise": wrong}


def main() -> None:
    """Run as many cases as asked for, and say what was found; exit 1 if anything was."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.cases)
    report = run_cases(
        ((number, draw_case(options.seed, number)) for number in numbers),
        lambda text: print(text, file=sys.stderr, flush=True),
        options.workers,
    )
    facts = {"dijiang": __version__, "seed": options.seed, "first": options.first, "cases": options.cases}
    text = json.dumps(facts | report | stream_texts(options.seed, options.cases), indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    sys.exit(bool(report["findings"]))


if __name__ == "__main__":
    main()
