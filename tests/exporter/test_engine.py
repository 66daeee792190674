"""Engines of every exported graph, built by TensorRT-RTX: it needs no GPU and no driver for that."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.graph.passes.turing import ExpandMatMuls
from dijiang.machine.driver import Gpu
from dijiang.recipe import PRECISIONS
from dijiang.runtime.sessions.engines import RTX_GPUS, TURING, EngineRecord, import_backend
from tests.conftest import GOLDEN, Golden, onnx_file, signed
from tests.graph.test_families import NAMED
from tests.random_models import write

#: One engine runs on all of them: 1 to 3 s a build.
MODERN = [gpu for gpu in RTX_GPUS if gpu != TURING]


@pytest.fixture
def primitive(exported, copy_of):
    """primitive(checkpoint, **options): a copy of a bundle that TensorRT can read."""
    return lambda name, **options: copy_of(exported(name, target="tensorrt", **options))


#: Analytic and tabled decay, both residuals, endless and bounded rotary angles.
@pytest.mark.parametrize(
    "name", ["neox-base", "neox-trained-decay", "neox-sequential-straddle", "tiny-python-published"]
)
def test_every_graph_is_an_engine_for_every_gpu(primitive, name):
    bundle = primitive(name)
    dijiang.build(bundle, backend="tensorrt_rtx", gpus=MODERN)
    opened = open_bundle(bundle)  # checks the hash of the engine too
    record = EngineRecord.from_dict(opened.manifest.engines["tensorrt_rtx"])
    assert record.gpus == tuple(MODERN)
    assert record.version == importlib.import_module("tensorrt_rtx").__version__
    weights = (bundle / "model.onnx.data").stat().st_size
    assert (bundle / record.file).stat().st_size > 0.8 * weights
    assert not list(bundle.glob(".*"))


@pytest.mark.parametrize(
    ("gpus", "precision"),
    [
        *((MODERN, precision) for precision in PRECISIONS),
        *(([TURING], precision) for precision, row in PRECISIONS.items() if row.turing),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
@pytest.mark.parametrize("variant", ["neox-sequential-tied", "opt-350m-like", "llama-gqa-4"])
def test_every_family_and_type_is_an_engine(tmp_path, variant, precision, gpus):
    (tmp_path / "checkpoint").mkdir()
    checkpoint = write(tmp_path / "checkpoint", NAMED[variant], trained=True, seed=1)
    options = {"target": "tensorrt", "precision": precision, "verify": False}
    bundle = dijiang.export(checkpoint, tmp_path / "b", **options)
    built = dijiang.build(bundle.path, backend="tensorrt_rtx", gpus=gpus)
    record = built.manifest.engines["tensorrt_rtx"]
    assert record["gpus"] == gpus
    assert (bundle.path / record["file"]).is_file()
    assert not list(bundle.path.glob(".*"))


@pytest.mark.parametrize("name", ["neox-base", "neox-sequential-straddle"])
def test_expanded_matmuls_compute_the_same(primitive, name):
    bundle, golden = primitive(name), Golden.load(name)
    graph = ir.load(onnx_file(bundle))
    ExpandMatMuls()(graph)
    assert not [n for n in graph.graph if n.op_type == "MatMul"]
    ir.save(graph, onnx_file(bundle))
    signed(bundle, onnx_file(bundle))
    model = dijiang.load(bundle)
    logits = model.forward(golden.ids[:1], model.new_state(), all_logits=True)
    assert np.abs(logits - golden.logits[:1]).max() <= 1e-4


def test_engine_is_replaced_by_the_next_build(primitive):
    bundle = primitive("neox-base")
    dijiang.build(bundle, backend="tensorrt_rtx", gpus=["sm86"])
    built = dijiang.build(bundle, backend="tensorrt_rtx", gpus=["sm89"], batch=3, longest=64)
    (record,) = open_bundle(bundle).manifest.engines.values()
    assert record == built.manifest.engines["tensorrt_rtx"]
    assert (record["gpus"], record["batch"], record["longest"]) == (["sm89"], 3, 64)
    third = dijiang.build(bundle, backend="tensorrt_rtx", gpus=["sm86"])
    assert {path.name for path in bundle.iterdir()} == {"dijiang.json", "README.md", *third.manifest.files}
    assert dijiang.export(GOLDEN["neox-base"], bundle, verify=False, force=True).manifest.engines == {}


def test_turings_graph_is_written_beside_no_link_in_the_bundle(primitive, tmp_path):
    bundle, outside = primitive("neox-base", precision="fp16"), tmp_path / "outside"
    outside.write_text("mine")
    for name in (".sm75.onnx", "sm75.onnx", "tensorrt_rtx.engine"):
        (bundle / name).symlink_to(outside)
    dijiang.build(bundle, backend="tensorrt_rtx", gpus=["sm75"])
    assert outside.read_text() == "mine"
    assert not (bundle / "tensorrt_rtx.engine").is_symlink()


def test_other_graphs_are_refused(exported):
    with pytest.raises(
        dijiang.ExportError, match=r"none of its graphs \(ort\); export again with --target tensorrt"
    ):
        dijiang.build(exported("neox-base", graph="ort"), backend="tensorrt_rtx")  # a GPU is not asked for


def test_a_single_gpu_need_not_be_in_a_list(primitive):
    with pytest.raises(dijiang.ExportError, match=r"cannot build for sm90, expected sm75"):
        dijiang.build(primitive("neox-base"), backend="tensorrt_rtx", gpus="sm90")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tpu"}, "backend 'tpu' is unknown"),
        ({"gpus": ["sm90"]}, r"cannot build for sm90, expected sm75, sm80"),
        ({"gpus": ["sm75", "sm86"]}, "sm75 needs an engine of its own"),
        ({"gpus": ["sm75"]}, r"no fp32 matmul on sm75; export again with --precision fp16"),
        ({"gpus": ["sm86"], "batch": 0}, "expected at least 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_work_are_one_error(exported, options, message):
    bundle = exported("neox-base", graph="primitive")
    with pytest.raises(dijiang.ExportError, match=message):
        dijiang.build(bundle, **({"backend": "tensorrt_rtx"} | options))
    assert open_bundle(bundle).manifest.engines == {}


def test_graph_that_the_parser_refuses_names_the_node(primitive):
    import onnx

    bundle = primitive("neox-base")
    graph = onnx.load(onnx_file(bundle), load_external_data=False)
    graph.graph.node[0].op_type = "Range"  # of one input
    del graph.graph.node[0].input[1:]
    onnx.save(graph, onnx_file(bundle))
    signed(bundle, onnx_file(bundle))
    with pytest.raises(dijiang.ExportError, match=r"TensorRT-RTX [\d.]+ cannot read node"):
        dijiang.build(bundle, backend="tensorrt_rtx", gpus=["sm86"])


def test_without_a_driver_the_gpu_must_be_named(exported, monkeypatch):
    monkeypatch.setattr("dijiang.machine.driver.LIBRARY", "libnothing.so")
    bundle = exported("neox-base", graph="primitive")
    with pytest.raises(dijiang.SessionError, match=r"no NVIDIA driver.* or name it: --gpu sm86"):
        dijiang.build(bundle, backend="tensorrt_rtx")
    with pytest.raises(dijiang.SessionError, match=r"no NVIDIA driver: .*install the driver"):
        dijiang.build(bundle, backend="tensorrt")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, r"TensorRT is not installed; use JetPack's own"),
        (
            SimpleNamespace(),
            r"package tensorrt is here without TensorRT's libraries \(it has no Builder\)",
        ),
        (
            SimpleNamespace(__version__="8.6.1", Builder=1),
            r"TensorRT 8.6.1 is too old, expected .* 10.3",
        ),
        (
            SimpleNamespace(__version__="9.7rc1", Builder=1),
            r"TensorRT 9.7rc1 is too old, expected .* 10.3",
        ),
    ],
    ids=["missing", "stub", "old", "candidate"],
)
def test_unusable_tensorrt_is_one_error(monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(dijiang.SessionError, match=message):
        import_backend("tensorrt")


def test_tensorrt_whose_libraries_do_not_load_is_one_error(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise FileNotFoundError('libnvinfer.so.10: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(dijiang.SessionError, match=r"without TensorRT's libraries \(libnvinfer.so.10"):
        import_backend("tensorrt")


RECORD = EngineRecord("e.engine", "tensorrt_rtx", "2.0", ("sm86",), None, 1, 256)


def test_record_of_an_engine_is_read_as_it_was_written():
    assert EngineRecord.from_dict(json.loads(json.dumps(RECORD.to_dict()))) == RECORD


WHOLE = RECORD.to_dict()


@pytest.mark.parametrize("data", [WHOLE | {"gpus": 86}, WHOLE | {"colour": "red"}, {"gpus": ["sm86"]}, {}])
def test_record_that_is_not_whole_is_one_line(data):
    with pytest.raises(dijiang.BundleError, match=r"^engine: not a whole record \(.*\); run dijiang build again$"):
        EngineRecord.from_dict(data)


@pytest.mark.parametrize(("version", "sm"), [("1.0", "sm86"), ("2.0", "sm89")], ids=["other version", "other GPU"])
def test_engine_of_another_machine_says_how_to_rebuild(version, sm):
    RECORD.require("2.0", Gpu(0, "RTX", "sm86", 1, 1, "13.0"))
    with pytest.raises(dijiang.SessionError, match=rf"rebuild with: dijiang build .* --gpu {sm}"):
        RECORD.require(version, Gpu(0, "RTX", sm, 1, 1, "13.0"))


def test_target_and_graph_that_disagree_are_refused(tmp_path):
    with pytest.raises(dijiang.ExportError, match="target tensorrt needs the primitive"):
        dijiang.export(GOLDEN["neox-base"], tmp_path / "b", target="tensorrt", graph="ort")
    with pytest.raises(dijiang.ExportError, match="target 'tpu' is unknown"):
        dijiang.export(GOLDEN["neox-base"], tmp_path / "b", target="tpu")
