"""Export: a whole bundle or nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter, namedtuple
from dataclasses import replace

import numpy as np
import onnx
import pytest

import dijiang
from dijiang.bundle.integrity import record_file
from dijiang.bundle.opened import open_bundle
from dijiang.errors import ExportError
from dijiang.exporter import export as export_module
from dijiang.exporter import plan as plan_module
from dijiang.exporter.plan import BASE_BYTES, plan_export
from dijiang.exporter.target_folder import check_target
from dijiang.models.checkpoint import Checkpoint
from dijiang.models.initial import write_random
from dijiang.models.load import load_checkpoint
from dijiang.models.presets import PRESETS
from dijiang.recipe import GRAPHS, PRECISIONS, Gate, resolve
from dijiang.runtime.sessions import inference
from tests.conftest import EXAMPLES, GOLDEN, RUNNABLE, graphs_of, onnx_file

BASE = GOLDEN["neox-base"]


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_bundle_holds_what_its_manifest_says(tmp_path):
    bundle = dijiang.export(EXAMPLES / "tiny-python", tmp_path / "b", verify=False)
    manifest = json.loads((tmp_path / "b" / "dijiang.json").read_text())
    assert left_in(tmp_path) == ["b"]
    assert manifest["reports"] == ["README.md"]
    assert set(left_in(tmp_path / "b")) == {*manifest["files"], "README.md", "dijiang.json"}
    graphs = [graph["file"] for graph in manifest["graphs"].values()]
    assert {"tokenizer.json", *graphs, "model.onnx.data"} <= set(manifest["files"])
    assert bundle.manifest.spec.state_bytes == 147456
    assert manifest["versions"].keys() == {"dijiang", "python", "numpy", "onnx", "onnx-ir"}
    assert (manifest["recipe"]["precision"], manifest["recipe"]["graphs"][0]) == ("fp32", RUNNABLE[0])
    assert (tmp_path / "b" / manifest["graphs"][RUNNABLE[0]]["file"]).stat().st_size < 60_000
    assert bundle.manifest == dijiang.load(tmp_path / "b").manifest


@pytest.mark.parametrize("graph", ["ort", "onnx", "primitive"])
def test_graph_passes_the_onnx_checker(exported, graph):
    onnx.checker.check_model(onnx_file(exported("neox-base", graph=graph)), full_check=True)


def test_graphs_are_those_that_the_installed_onnxruntime_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "version", lambda _: "1.22.1")
    assert list(dijiang.export(BASE, tmp_path / "old").manifest.graphs) == ["primitive"]
    assert list(dijiang.export(BASE, tmp_path / "int8", precision="int8").manifest.graphs) == ["primitive"]
    monkeypatch.setattr(inference, "version", lambda _: "1.23.2")
    ours = ["native"] if "native" in RUNNABLE else []
    assert list(dijiang.export(BASE, tmp_path / "python-3.10").manifest.graphs) == [*ours, "primitive"]
    assert list(dijiang.export(BASE, tmp_path / "new-int8", precision="int8").manifest.graphs) == (
        ours or ["primitive"]
    )
    monkeypatch.setattr(inference, "version", lambda _: "1.30.0")
    monkeypatch.setattr(inference, "installed_library", refuse)
    assert list(dijiang.export(BASE, tmp_path / "new", verify=False).manifest.graphs) == [
        "ort",
        "webgpu",
        "primitive",
    ]


def refuse():
    raise dijiang.SessionError("not compiled")


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
@pytest.mark.parametrize(
    ("precision", "graphs"),
    [
        ("fp32", ["native", "ort", "webgpu", "primitive", "cuda"]),
        ("int8", ["native", "ort", "webgpu"]),
        ("fp16", ["ort", "cuda"]),
    ],
)
def test_default_export_holds_every_graph_that_shares_its_weights(exported, precision, graphs):
    bundle = exported("tiny-python", precision=precision)
    assert list(json.loads((bundle / "dijiang.json").read_text())["graphs"]) == graphs
    alone = exported("tiny-python", precision=precision, graph="ort")
    whole, least = ((folder / "model.onnx.data").stat().st_size for folder in (bundle, alone))
    # In 16 bits the cuda graph has the weights of its norms in float32.
    assert least <= whole <= 1.001 * least
    ids, logits = np.random.default_rng(0).integers(0, 2048, (20, 30)), {}
    for graph in graphs:
        model = dijiang.load(bundle, graph=graph)
        assert model.graph == graph
        logits[graph] = model.forward(ids, model.new_state(20))
    assert dijiang.load(bundle).graph == graphs[0]
    # Of integers one kind of graph rounds activations, the other does not.
    first, *others = [found for graph, found in logits.items() if precision == "fp32" or not GRAPHS[graph].exact]
    for other in others:
        # Where two graphs round an activation to different integers is chance: a text says little, 20 say more.
        worst = np.abs(other - first).max(-1)
        assert worst.max() <= 1e-4 if precision == "fp32" else np.median(worst) <= 0.05


def test_primitive_graph_uses_standard_nodes_of_opset_17(exported):
    model = onnx.load(onnx_file(exported("neox-base", graph="primitive")), load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert not {"LinearAttention", "Loop", "Scan", "If"} & {node.op_type for node in model.graph.node}


def test_exporting_twice_gives_the_same_bytes(tmp_path):
    first = dijiang.export(BASE, tmp_path / "a").manifest
    assert dijiang.export(BASE, tmp_path / "b").manifest == first


def test_codes_to_nearest_do_not_depend_on_the_number_of_threads(tmp_path):
    """Mixing channels was a product of OpenBLAS, whose sums do."""
    code = (
        "import sys, dijiang; dijiang.export(*sys.argv[1:], precision='int8', calibration_tokens=0, verify=False)"
    )
    hashes = set()
    for threads in ("1", "2"):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads}
        call = [sys.executable, "-c", code, EXAMPLES / "tiny-python", tmp_path / threads]
        subprocess.run(call, env=environment, check=True)
        hashes.add(record_file(tmp_path / threads / "model.onnx.data"))
    assert len(hashes) == 1


def test_export_refuses_to_overwrite_without_force(tmp_path):
    dijiang.export(BASE, tmp_path / "b")
    before = (tmp_path / "b" / "model.onnx").stat().st_mtime_ns
    with pytest.raises(dijiang.ExportError, match="never overwritten; use --force"):
        dijiang.export(BASE, tmp_path / "b")
    assert (tmp_path / "b" / "model.onnx").stat().st_mtime_ns == before
    dijiang.export(BASE, tmp_path / "b", graph="primitive", force=True)
    assert dijiang.load(tmp_path / "b").graph == "primitive"
    assert left_in(tmp_path) == ["b"]


def test_force_refuses_to_replace_a_folder_that_is_no_bundle(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(dijiang.ExportError, match="is no bundle"):
        dijiang.export(BASE, tmp_path / "thesis", force=True)
    assert left_in(tmp_path / "thesis") == ["chapter.txt"]


def test_failed_forced_export_keeps_the_old_bundle(tmp_path, monkeypatch):
    old = dijiang.export(BASE, tmp_path / "b").manifest

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "save_graphs", full)
    with pytest.raises(dijiang.ExportError, match="No space left on device"):
        dijiang.export(BASE, tmp_path / "b", force=True)
    assert left_in(tmp_path) == ["b"]
    assert dijiang.load(tmp_path / "b").manifest == old


def test_disk_that_fills_while_writing_is_one_clear_error(tmp_path):
    """A real failing write: the child may not write files of more than 100 kB."""
    script = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from dijiang.cli import main\n"
        f"main(['export', {str(BASE)!r}, '-o', {os.fspath(tmp_path / 'b')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "cannot be written" in done.stderr
    assert left_in(tmp_path) == []


def test_export_checks_free_space_before_it_writes(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 4096))
    with pytest.raises(dijiang.ExportError, match=r"needs 1\.\d MB, 0\.0 MB are free"):
        dijiang.export(BASE, tmp_path / "b")
    assert left_in(tmp_path) == []


def test_export_checks_available_memory_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "available_bytes", lambda: 10**8)
    with pytest.raises(dijiang.ExportError, match=r"needs 1\d\d\.\d MB of memory, 100\.0 MB are"):
        dijiang.export(BASE, tmp_path / "b")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("precision", "verify"),
    [("fp32", False), pytest.param("fp32", True, marks=pytest.mark.samples), ("int8", False)],
)
def test_memory_of_an_export_is_a_few_of_its_largest_tensor(tmp_path, precision, verify):
    config = PRESETS["pythia-70m"] | {"hidden_size": 384, "num_hidden_layers": 24, "vocab_size": 1000}
    config |= {"intermediate_size": 1536, "max_position_embeddings": 64}
    dijiang.export(BASE, tmp_path / "first")  # imports are no part of it
    checkpoint = write_random(config, tmp_path / "checkpoint", dtype="float32")
    model = load_checkpoint(checkpoint)
    recipe, graphs = graphs_of(model, resolve(precision, calibration_tokens=0, runs_here=RUNNABLE.__contains__))
    tracemalloc.start()
    dijiang.export(checkpoint, tmp_path / "b", precision=precision, calibration_tokens=0, verify=verify)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    plan = plan_export(model, graphs, recipe, verify=verify)
    graph_bytes = 4 << 20
    assert peak < plan.memory - BASE_BYTES + graph_bytes
    assert verify or plan.memory - BASE_BYTES < 4 * model.parameters / 4


def test_export_makes_missing_parents_and_leaves_none_if_it_fails(tmp_path, monkeypatch):
    assert dijiang.export(BASE, tmp_path / "a" / "b" / "c", verify=False).path.is_dir()
    assert left_in(tmp_path / "a") == ["b"]
    assert left_in(tmp_path / "a" / "b") == ["c"]
    monkeypatch.setattr(plan_module, "available_bytes", lambda: 10**8)
    with pytest.raises(dijiang.ExportError, match="MB of memory"):
        dijiang.export(BASE, tmp_path / "a" / "d" / "e")
    assert left_in(tmp_path / "a") == ["b"]


def test_export_into_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(dijiang.ExportError, match="cannot be written"):
        dijiang.export(BASE, tmp_path / "file" / "b")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_output_folder_that_is_not_writable_is_one_clear_error(tmp_path, monkeypatch, code):
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(export_module.Path, "mkdir", refuse)
    with pytest.raises(dijiang.ExportError, match=f"cannot be written .{os.strerror(code)}"):
        dijiang.export(BASE, tmp_path / "b")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_weights_leave_nothing_behind(edit_tensors, tmp_path, value):
    def damage(tensors):
        tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"][3, 5] = value

    broken = edit_tensors("neox-base", damage)
    (tmp_path / "out").mkdir()
    with pytest.raises(dijiang.CheckpointError, match=r"layers\.1\.mlp\.dense_4h_to_h\.weight holds NaN"):
        dijiang.export(broken, tmp_path / "out" / "b")
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize(("option", "value"), [("precision", "fp7"), ("graph", "latin")])
def test_unknown_option_names_the_known_ones(tmp_path, option, value):
    with pytest.raises(dijiang.ExportError, match=f"{option} '{value}' is unknown, expected one of"):
        dijiang.export(BASE, tmp_path / "b", **{option: value})


def test_unknown_activation_is_refused(edit_config, tmp_path):
    broken = edit_config("neox-base", hidden_act="mystery")
    with pytest.raises(dijiang.CheckpointError, match="hidden_act 'mystery' is not supported"):
        dijiang.export(broken, tmp_path / "b")


def test_killed_export_leaves_nothing_that_loads(tmp_path):
    script = (
        "import os, signal, sys, dijiang\n"
        "from dijiang.exporter import contents\n"
        "contents._manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"dijiang.export({str(BASE)!r}, {os.fspath(tmp_path / 'b')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    for name in left_in(tmp_path):
        with pytest.raises(dijiang.BundleError):
            dijiang.load(tmp_path / name)
    assert dijiang.export(BASE, tmp_path / "b").path.is_dir()
    assert left_in(tmp_path) == ["b"]  # what the killed one left is gone


def test_export_verifies_and_keeps_the_report(tmp_path):
    bundle = dijiang.export(BASE, tmp_path / "b")
    assert bundle.parity["passed"]
    assert bundle.parity["text"] == "random token ids"
    assert [bundle.parity["graph"], *(other["graph"] for other in bundle.parity["others"])] == list(
        bundle.manifest.graphs
    )
    assert {record.passed for record in bundle.manifest.graphs.values()} == {True}
    assert dijiang.load(tmp_path / "b").manifest == bundle.manifest
    assert dijiang.export(BASE, tmp_path / "unseen", verify=False).parity is None


def test_export_with_text_measures_perplexity(tmp_path):
    text = EXAMPLES / "tiny-python" / "held_out.txt"
    (tmp_path / "short.txt").write_text(text.read_text(encoding="utf-8")[:500], encoding="utf-8")
    bundle = dijiang.export(EXAMPLES / "tiny-python", tmp_path / "b", text=tmp_path / "short.txt")
    assert bundle.parity["logits"]["perplexity"] > 1


def test_bundle_that_fails_its_gate_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], gates=(Gate("max_error", 1e-12),)))
    with pytest.raises(dijiang.ParityError, match=r"max_error .* nothing was written"):
        dijiang.export(BASE, tmp_path / "b")
    assert left_in(tmp_path) == []
    assert dijiang.export(BASE, tmp_path / "b", verify=False).path.is_dir()


def test_export_that_cannot_be_verified_says_so_before_it_writes(tmp_path, monkeypatch):
    missing = tmp_path / "no.txt"
    for text, message in ((EXAMPLES / "README.md", "no tokenizer.json"), (missing, "no tokenizer.json")):
        with pytest.raises(dijiang.InputError, match=message):
            dijiang.export(BASE, tmp_path / "b", text=text)
    with pytest.raises(dijiang.InputError, match="cannot be read"):
        dijiang.export(EXAMPLES / "tiny-python", tmp_path / "b", text=missing)
    monkeypatch.setattr(inference, "version", lambda _: "1.2.3")
    with pytest.raises(dijiang.ExportError, match=r"cannot be verified: .*upgrade onnxruntime; or use --no"):
        dijiang.export(BASE, tmp_path / "b", graph="ort")
    assert left_in(tmp_path) == []


WRITTEN = [("fp32", "onnxruntime"), ("fp16", "onnxruntime"), ("fp16", "tensorrt"), ("int8", "tensorrt")]
WRITTEN += [("int8", "onnxruntime"), ("int4", "onnxruntime"), ("int8", "cuda")] * ("ort" in RUNNABLE)


@pytest.mark.parametrize(("precision", "target"), WRITTEN)
def test_each_weight_is_read_once_while_the_bundle_is_written(tmp_path, monkeypatch, precision, target):
    reads, read = Counter(), Checkpoint.read

    def counted(checkpoint, name):
        reads[name] += 1
        return read(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    shown = []
    options = {"precision": precision, "target": target, "verify": False, "calibration_tokens": 0}
    dijiang.export(BASE, tmp_path / "b", **options, progress=lambda *step: shown.append(step))
    # A norm's vectors go into every projection after it.
    assert {count for name, count in reads.items() if "layernorm" not in name} == {1}
    assert reads.keys() == load_checkpoint(BASE).checkpoint.shapes.keys()
    stages, done, totals = zip(*shown, strict=True)
    assert {stage.split()[0] for stage in stages} == {"write"}
    assert list(done) == sorted(done)
    assert (done[0], done[-1]) == (0, totals[-1])


def test_folder_with_the_name_of_a_file_is_not_lost(exported, copy_of):
    bundle = copy_of(exported("neox-base"))
    (bundle / "README.md").unlink()
    (bundle / "README.md").mkdir()
    (bundle / "README.md" / "mine").write_text("x")
    with pytest.raises(ExportError, match=r"README\.md is no part of the bundle there"):
        check_target(bundle, [], force=True)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_recipe_of_tensorrt_names_the_blocks_of_the_graph(exported, precision):
    bundle = exported("tiny-python", precision=precision, target="tensorrt")
    recipe = open_bundle(bundle).manifest.recipe
    graph = onnx.load(onnx_file(bundle), load_external_data=False).graph
    types = {value.name: value.data_type for value in graph.initializer}
    found = {
        (types[node.input[0]], next(a.i for a in node.attribute if a.name == "block_size"))
        for node in graph.node
        if node.op_type == "DequantizeLinear"
    }
    kinds = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4}
    assert found == {(kinds[blocks.bits], blocks.block) for blocks in (recipe.body, recipe.head)}
    assert (recipe.body.rotation, recipe.head.rotation, recipe.embed) == (0, 0, None)
