"""The plan of an export: an upper bound of what a real one needs, and not a wild one."""

import math
import os
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace

import psutil
import pytest

import dijiang
from dijiang.exporter import plan as plan_module
from dijiang.exporter.plan import BASE_BYTES, plan_export
from dijiang.graph.reads import weight_bytes
from dijiang.models.initial import write_random
from dijiang.models.load import load_checkpoint
from dijiang.models.presets import PRESETS
from dijiang.parity.emulation import emulate
from dijiang.recipe import resolve
from tests.conftest import GOLDEN, RUNNABLE, graphs_of

#: 20 million parameters: weights outgrow what a process needs in any case.
CONFIG = PRESETS["pythia-70m"] | {"num_hidden_layers": 2, "vocab_size": 12_000}
CONFIG |= {"max_position_embeddings": 256}
TOKENS = 256
CLI = "from dijiang.cli import main; main()"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random(CONFIG, tmp_path_factory.mktemp("plan") / "checkpoint")


def peak_anonymous(*arguments, code=CLI, **environment):
    """Largest anonymous memory of a command in a process of its own, bytes; environment: variables beside ours."""
    peak, command = 0, [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment) as process:
        watch = psutil.Process(process.pid)
        while process.poll() is None:
            memory = watch.memory_info()
            peak = max(peak, memory.rss - memory.shared)
            time.sleep(0.005)
    assert process.returncode == 0
    return peak


@pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
@pytest.mark.parametrize(
    ("precision", "target", "tokens", "verify", "budget"),
    [
        ("fp32", "onnxruntime", 0, True, None),
        ("fp16", "onnxruntime", 0, True, None),
        ("int8", "onnxruntime", 0, True, None),
        ("int4", "onnxruntime", TOKENS, False, None),
        ("int4", "onnxruntime", TOKENS, False, 16.0),
        ("int8", "cuda", 0, True, None),
        ("int4", "cuda", 0, False, None),
        ("int8", "tensorrt", 0, False, None),
        ("int4", "tensorrt", 0, True, None),
    ],
    ids=[
        "fp32",
        "fp16-emulated",
        "int8",
        "int4-calibrated",
        "int4-budget",
        "int8-cuda",
        "int4-cuda",
        "int8-tensorrt",
        "int4-tensorrt",
    ],
)
def test_planned_memory_bounds_that_of_a_real_export(
    checkpoint, precision, target, tokens, verify, budget, tmp_path
):
    model = load_checkpoint(checkpoint)
    calibrated = precision.startswith("int") and target != "tensorrt"
    wanted = tokens if calibrated else None
    recipe = resolve(
        precision, target=target, calibration_tokens=wanted, budget=budget, runs_here=RUNNABLE.__contains__
    )
    recipe, graphs = graphs_of(model, recipe)
    plan = plan_export(model, graphs, recipe, verify=verify)
    options = ["--precision", precision, "--target", target, *(() if verify else ("--no-verify",))]
    options += ["--calibration-tokens", tokens] if calibrated else []
    options += ["--budget", budget] if budget else []
    peak = peak_anonymous("export", checkpoint, "-o", tmp_path / "b", *options)
    assert plan.memory / 2 < peak < plan.memory
    size = sum(file.stat().st_size for file in (tmp_path / "b").iterdir())
    most = max(size, round(1e6 * (budget or 0)))
    assert size - plan_module.SPARE_BYTES < plan.disk <= most + plan_module.SPARE_BYTES


def plan_of(checkpoint, precision, tokens=0, budget=None, **options):
    model = load_checkpoint(checkpoint)
    recipe, graphs = graphs_of(model, resolve(precision, graph="ort", calibration_tokens=tokens, budget=budget))
    return plan_export(model, graphs, recipe, **options)


def test_plan_counts_calibration_and_emulation(checkpoint):
    parameters = load_checkpoint(checkpoint).parameters
    nearest = plan_of(checkpoint, "int4", verify=False)
    drawn = plan_of(checkpoint, "int4", TOKENS, verify=False)
    assert drawn.memory > nearest.memory + 2 * parameters - BASE_BYTES
    assert nearest.temporary == 0 < parameters < drawn.temporary < 4 * parameters
    spent = plan_of(checkpoint, "int4", TOKENS, budget=16.0, verify=False)
    assert spent.temporary > drawn.temporary + parameters
    assert spent.memory > drawn.memory
    assert spent.disk == 16_000_000 + plan_module.SPARE_BYTES
    assert drawn.seconds > nearest.seconds
    assert 4 * parameters < plan_of(checkpoint, "fp16", verify=True).temporary < 4.1 * parameters
    assert plan_of(checkpoint, "fp16", verify=False).temporary == 0


def test_plan_counts_one_part_of_a_large_bundle(tmp_path, monkeypatch):
    """Of so many layers that all of them are more than what the reference keeps."""
    checkpoint = write_random(CONFIG | {"num_hidden_layers": 2 * CONFIG["num_hidden_layers"]}, tmp_path / "c")
    kinds = [("fp16", False), ("int8", False), ("int8", True)]
    whole = [plan_of(checkpoint, precision, verify=True, text=text) for precision, text in kinds]
    monkeypatch.setattr("dijiang.parity.cut.PART_BYTES", 0)
    split = [plan_of(checkpoint, precision, verify=True, text=text) for precision, text in kinds]
    embedding = 4 * math.prod(load_checkpoint(checkpoint).weights.shape("embed.weight"))
    assert [plan.temporary < 1.1 * embedding for plan in split] == [True] * 3
    assert split[0].memory < whole[0].memory
    # Only text that the bundle draws itself costs loading it again and again.
    assert [a.seconds > b.seconds for a, b in zip(split, whole, strict=True)] == [False, True, False]


def test_temporary_files_need_room_on_their_own_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    plan = plan_module.Plan(disk=600, temporary=500, memory=0, seconds=1)
    folder = tmp_path / "b"
    folder.mkdir()
    monkeypatch.setattr(plan_module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda _: usage(0, 0, 1_000))
    with pytest.raises(dijiang.ExportError, match=r"the export needs 0\.0 MB"):
        plan.require(folder)  # one disk for both
    monkeypatch.setattr(plan_module, "_device", lambda place: place)
    plan.require(folder)


@pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
def test_calibration_that_does_not_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "available_bytes", lambda: 10**8)
    monkeypatch.setattr("dijiang.exporter.pipeline.calibrate", None)
    with pytest.raises(dijiang.ExportError, match=r"of memory, 100\.0 MB are available"):
        dijiang.export(GOLDEN["neox-base"], tmp_path / "b", precision="int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "graph", "target", "emulated"),
    [
        ("fp16", "ort", "onnxruntime", True),
        ("bf16", "primitive", "onnxruntime", True),
        ("int8", "ort", "cuda", True),
        ("int4", "ort", "cuda", True),
        ("int8", "primitive", "onnxruntime", True),
        ("int4", "primitive", "onnxruntime", True),
        ("int8", "webgpu", "onnxruntime", True),
        ("int4", "webgpu", "onnxruntime", True),  # its head has 8 bits
        ("int8", "ort", "onnxruntime", False),
    ],
)
def test_planned_copy_is_as_large_as_the_emulated_graph(checkpoint, precision, graph, target, emulated):
    model = load_checkpoint(checkpoint)
    recipe, graphs = graphs_of(model, resolve(precision, graph=graph, target=target))
    planned = plan_export(model, graphs, replace(recipe, calibration_tokens=0), verify=True).temporary
    changed = emulate(graphs[graph])
    assert planned == (weight_bytes(graphs[graph]) if changed else 0)
    assert changed == emulated
