"""llama.cpp as a peer: fetched from PyPI, built here, measured by its own llama-bench."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dijiang.bench.matrix import Test
from dijiang.bench.subject import Subject
from dijiang.machine.limits import usable_cores

#: The source distribution that carries llama.cpp.
PACKAGE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-bench", "llama-quantize")
#: Release build for this CPU; nothing that a benchmark does not run.
CMAKE = [
    *["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF"],
    *["-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"],
]
#: Field of a GGUF file -> its name in config.json.
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "parallel_residual": "use_parallel_residual",
    "layer_norm_eps": "layer_norm_eps",
    "vocab_size": "vocab_size",
}


def _run(*command: str | Path) -> None:
    """A build step, its output on stderr; stops the script if it fails."""
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def build(cache: Path) -> Path:
    """The folder of llama-bench and llama-quantize in `cache`; minutes the first time."""
    folder = cache / "build" / "bin"
    if all((folder / tool).is_file() for tool in TOOLS):
        return folder
    source = next(cache.glob("llama_cpp_python-*/vendor/llama.cpp"), None) or _fetch(cache)
    _run("cmake", "-S", source, "-B", folder.parent, "-G", "Ninja", *CMAKE)
    _run("cmake", "--build", folder.parent, "-j", str(os.cpu_count()), "--target", *TOOLS)
    return folder


def _fetch(cache: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps")
    _run(*pip, "-d", cache, PACKAGE)
    with tarfile.open(next(cache.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(cache, filter="data")
    return next(cache.glob("llama_cpp_python-*/vendor/llama.cpp"))


def version(cache: Path) -> dict[str, str]:
    """What was built, and with which compiler; empty where nothing was."""
    file = cache / "build" / "CMakeCache.txt"
    settings = file.read_text() if file.is_file() else ""
    compiler = re.search(r"^CMAKE_CXX_COMPILER:FILEPATH=(.+)$", settings, re.MULTILINE)
    if compiler is None:
        return {}
    said = subprocess.run([compiler[1], "--version"], capture_output=True, text=True, check=True).stdout
    options = " ".join((*CMAKE, "OpenMP" if "\nGGML_OPENMP:BOOL=ON\n" in settings else "no OpenMP"))
    return {"llama.cpp": PACKAGE, "compiler": said.splitlines()[0], "options": options}


def logits_tool(cache: Path) -> Path:
    """`llama-logits` in `cache`, from llama_logits.cc beside this file and llama.cpp's libraries."""
    tool = cache / "llama-logits"
    if not tool.is_file():
        built, source = build(cache).parent, next(cache.glob("llama_cpp_python-*/vendor/llama.cpp"))
        parts = ["src/libllama.a", *(f"ggml/src/libggml{part}.a" for part in ("", "-cpu", "-base"))]
        includes = [f"-I{source / folder}" for folder in ("include", "ggml/include")]
        libraries = [*(built / part for part in parts), "-fopenmp", "-lpthread", "-ldl"]
        own = Path(__file__).with_name("llama_logits.cc")
        _run("c++", "-O2", "-std=c++17", *includes, own, *libraries, "-o", tool)
    return tool


def convert(checkpoint: Path, cache: Path) -> Path:
    """A checkpoint of transformers as an F32 GGUF file in `cache`, by llama.cpp's own converter."""
    build(cache)
    target = cache / f"{checkpoint.name}-f32.gguf"
    if not target.is_file():
        source, copy = next(cache.glob("llama_cpp_python-*/vendor/llama.cpp")), cache / checkpoint.name
        shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
        config = json.loads((copy / "config.json").read_text())
        config.pop("quantization_config", None)  # where it came from; the weights are float32
        (copy / "config.json").write_text(json.dumps(config))
        script = [source / "convert_hf_to_gguf.py", copy, "--outtype", "f32", "--outfile", target]
        _run("env", f"PYTHONPATH={source / 'gguf-py'}", sys.executable, *script)
    return target


def quantized(cache: Path, source: Path, kind: str) -> Path:
    """A GGUF file in another type, by llama-quantize as its users do."""
    target = source.with_name(f"{source.name.rsplit('-', 1)[0]}-{kind}.gguf")
    if not target.is_file():
        _run(build(cache) / "llama-quantize", source, target, kind.upper())
    return target


def write_model(config: dict[str, Any], path: Path) -> None:
    """A vanilla GPT-NeoX of this config.json with random weights, as an F16 GGUF file."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "gptneox")
    for name, key in FIELDS.items():
        getattr(writer, f"add_{name}")(config[key])
    head_size = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(config["rotary_pct"] * head_size))
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 2:
            values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            writer.add_tensor(name, values.astype(np.float16))
        else:
            fill = np.zeros if name.endswith(".bias") else np.ones
            writer.add_tensor(name, fill(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes ([out, in]) of a vanilla GPT-NeoX."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    linear = {"attn_qkv": (3 * hidden, hidden), "attn_output": (hidden, hidden)}
    linear |= {"ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output.weight": (vocab, hidden)}
    norms = ["output_norm"]
    for layer in range(config["num_hidden_layers"]):
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
        for name, shape in linear.items():
            shapes |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
    return shapes | {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}


def model(cache: Path, preset: str, config: dict[str, Any], kind: str) -> Path:
    """A GGUF file of a type (q8_0, q4_0), quantized by llama-quantize as its users do."""
    target = cache / f"{preset}-{kind}.gguf"
    if not target.is_file():
        source = cache / f"{preset}-f16.gguf"
        if not source.is_file():
            write_model(config, source)
        quantized(cache, source, kind)
    return target


class LlamaBench(Subject):
    """One GGUF file under llama-bench: a process a repetition, its own warm-up before each test."""

    def __init__(self, path: str, threads: int | None, provider: str, options: tuple[str, ...] = ()) -> None:
        self.provider, tool = PACKAGE, build(Path(path).parent) / "llama-bench"
        self._command = [str(tool), "-m", path, "-o", "json", "-r", "1", *options]
        self._command += ["-t", str(threads or usable_cores())]

    def prepare(self, tests: Sequence[Test]) -> None:
        """Each process makes its own state, and warms itself up."""

    def warm_up(self, test: Test) -> None:
        """See prepare."""

    def peaks(self) -> dict[str, int | None]:
        """Not measured: the memory is that of another program."""
        return {"host": None, "device": None}

    def seconds(self, test: Test) -> list[float]:
        """Seconds of a prompt, or of all decode steps after a really computed prompt."""
        prompt, steps = (test.tokens, 0) if test.prompt else (0, test.tokens)
        flags = f"-p {prompt} -n {steps} -d {test.depth}".split()
        done = subprocess.run([*self._command, *flags], capture_output=True, text=True, check=True)
        return samples(done.stdout)


def samples(report: str) -> list[float]:
    """The samples of llama-bench's JSON report of one test, in seconds."""
    tests = json.loads(report)
    if len(tests) != 1 or not tests[0]["samples_ns"]:
        raise ValueError(f"llama-bench reported {len(tests)} tests, expected one with samples")
    return [ns / 1e9 for ns in tests[0]["samples_ns"]]
