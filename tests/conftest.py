"""Golden data: checkpoints with logits of the published modelling code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial, partialmethod
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from filelock import FileLock
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import dijiang
from dijiang.bench import measure
from dijiang.bundle.integrity import record_file
from dijiang.exporter.pipeline import fitted, step_graph
from dijiang.machine.bandwidth import measure_bandwidth
from dijiang.models.binding import ADDED
from dijiang.recipe import GRAPHS
from dijiang.runtime.sessions.inference import runs_here

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"

GOLDEN = {path.name: path for path in [*sorted((TESTS / "golden").iterdir()), EXAMPLES / "tiny-python"]}
#: A shell gives what it runs in the background no SIGINT: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: `pytest -n 2`: each process has cores of its own, so that no thread waits for those of another.
WORKER, WORKERS = os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if WORKER and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(WORKER.removeprefix("gw")) :: int(WORKERS)] or cores)

if "mix_stderr" in signature(CliRunner).parameters:  # click before 8.2: both outputs apart, as later ones have it
    CliRunner.__init__ = partialmethod(CliRunner.__init__, mix_stderr=False)

#: Python 3.10 has no onnxruntime that runs the others.
RUNNABLE = [graph for graph in GRAPHS if runs_here(graph)]


def onnx_file(bundle: Path, graph: str | None = None) -> Path:
    """The file of a graph of a bundle; None: of its first."""
    graphs = json.loads((bundle / "dijiang.json").read_text())["graphs"]
    return bundle / graphs[graph or next(iter(graphs))]["file"]


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as a stranger would, who leaves its digest out."""
    path = bundle / "dijiang.json"
    manifest = json.loads(path.read_text())
    manifest.pop("digest", None)
    edit(manifest)
    path.write_text(json.dumps(manifest))


def signed(bundle: Path, *files: Path) -> None:
    """Give a bundle the hashes of files that a test changed."""
    found = {file.name: asdict(record_file(file)) for file in files}
    edit_manifest(bundle, lambda manifest: manifest["files"].update(found))


def graphs_of(model, recipe):
    """The recipe that fits a model, and its graphs as they would be written."""
    recipe = fitted(recipe, model)
    return recipe, {name: step_graph(model, name, recipe) for name in recipe.graphs}


@dataclass(frozen=True)
class Golden:
    """A golden case: ids [B, T], the positions whose logits [B, P, V] are known."""

    path: Path
    ids: np.ndarray
    positions: np.ndarray
    logits: np.ndarray

    @classmethod
    def load(cls, name: str) -> Golden:
        path = GOLDEN[name]
        with np.load(path / "golden.npz") as data:
            ids = data["input_ids"]
            positions = data["positions"] if "positions" in data else np.arange(ids.shape[1])
            return cls(path, ids, positions, data["logits"])

    def error(self, logits: np.ndarray) -> float:
        """Largest difference of all-position logits [B, T, V] from the golden ones."""
        return float(np.abs(logits[:, self.positions] - self.logits).max())


def with_start_token(file: Path) -> Tokenizer:
    """A tokenizer that begins a text with token 0, as LLaMA's and OPT's begin it with theirs."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return tokenizer


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """exported(checkpoint, **options): the bundle folder of an export, made once for all processes."""
    base = tmp_path_factory.getbasetemp()
    bundles = (base.parent if WORKER else base) / "exported"
    bundles.mkdir(exist_ok=True)

    def get(checkpoint: str, **options) -> Path:
        options = {"calibration_tokens": 0} | options  # seconds each
        key = hashlib.sha256(repr((checkpoint, sorted(options.items(), key=str))).encode()).hexdigest()
        target = bundles / key / checkpoint
        with FileLock(bundles / f"{key}.lock"):
            if not target.exists():  # an export is there whole, or not at all
                target.parent.mkdir(exist_ok=True)
                dijiang.export(GOLDEN[checkpoint], target, verify=False, **options)
        return target

    return get


#: A chat template that ends answers with the example's end token.
TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)
#: One that knows tools. A call begins with a token that one can ask for.
TOOLED = (
    "{% if tools %}# tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}: {{ c.function.arguments | tojson }}){% endfor %}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}# assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """What `talkative` makes."""
    return talkative(tmp_path_factory.mktemp("chatty"))


def talkative(folder: Path) -> Path:
    """The example in int8, where a batch changes no bit, with a chat template and its authors' sampling."""
    checkpoint = Path(shutil.copytree(EXAMPLES / "tiny-python", folder / "checkpoint"))
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    (checkpoint / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 50}))
    dijiang.export(checkpoint, folder / "tiny", precision="int8", calibration_tokens=0, verify=False)
    return folder / "tiny"


@pytest.fixture(scope="session", autouse=True)
def small_bandwidth():
    """What `dijiang bench` says of the memory comes from a megabyte: the real one takes 5 seconds a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure_bandwidth", partial(measure_bandwidth, size=1 << 20))
        yield


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(folder): a writable copy to damage."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-{folder.name}"))

    return copy


@pytest.fixture
def edit_tensors(copy_of):
    """edit_tensors(name, edit): a copy of a safetensors golden case after edit(tensors) on its dict."""

    def apply(name: str, edit) -> Path:
        folder = copy_of(GOLDEN[name])
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return apply


@pytest.fixture
def edit_config(copy_of):
    """edit_config(name, **changes): a copy of a golden case with another config.json."""

    def apply(name: str, **changes) -> Path:
        folder = copy_of(GOLDEN[name])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return apply


@pytest.fixture
def vanilla(edit_tensors):
    """The golden GPT-NeoX checkpoint without what DiJiang adds."""

    def unconvert(tensors):
        for name in [n for n in tensors if n.endswith(ADDED)]:
            del tensors[name]

    return edit_tensors("neox-base", unconvert)


@pytest.fixture
def traffic(monkeypatch):
    """Bytes of every copy to a device's tensors and from them, in order: (direction, bytes)."""
    seen, value = [], onnxruntime.OrtValue
    write, read = value.update_inplace, value.numpy

    def count_write(self, array):
        seen.append(("in", array.nbytes))
        write(self, array)

    def count_read(self):
        found = read(self)
        seen.append(("out", found.nbytes))
        return found

    monkeypatch.setattr(value, "update_inplace", count_write)
    monkeypatch.setattr(value, "numpy", count_read)
    return seen


def poisoned(model: dijiang.Model) -> dijiang.State:
    """A state that was continued and then lost a number, as where one left the range of float16."""
    state = model.new_state()
    list(model.generate([3, 4, 5], max_tokens=2, state=state, ignore_eos=True))
    state.layers[-1][..., 0] = np.nan
    return state


def take_turns(device, cpu, longest, tolerance):
    """Three states of two models of one bundle, advanced in random order; those of the device and of the CPU.

    Every piece, of up to `longest` tokens, must give logits that differ by `tolerance` at most.
    """
    states = [[model.new_state() for _ in range(3)] for model in (device, cpu)]
    random = np.random.default_rng(0)
    for _ in range(25):
        which, ids = random.integers(3), random.integers(0, 90, (1, random.integers(1, longest + 1)))
        found, expected = (m.forward(ids, s[which]) for m, s in zip((device, cpu), states, strict=True))
        np.testing.assert_allclose(found, expected, atol=tolerance)
    return states
