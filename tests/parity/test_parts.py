"""A bundle in parts: every bit of the whole one, in less memory."""

import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dijiang
from dijiang.models.initial import write_random
from dijiang.models.load import load_checkpoint
from dijiang.models.presets import PRESETS
from dijiang.parity import cut, parts
from dijiang.parity.emulation import load_emulated
from dijiang.parity.parts import Call, PartedModel, through
from tests.conftest import RUNNABLE, onnx_file
from tests.exporter.test_plan import CLI, peak_anonymous
from tests.graph.test_families import NAMED
from tests.random_models import configs, write

#: 38 million parameters, most of them in 12 layers.
CONFIG = PRESETS["pythia-70m"] | {"num_hidden_layers": 12, "vocab_size": 500}
BOUNDED = "from dijiang.parity import cut; cut.PART_BYTES = {};" + CLI

PRECISIONS = {"native": ("fp32", "int8", "int4"), "webgpu": ("fp32", "int4"), "onnx": ("fp32", "fp16")}
PRECISIONS |= {"cuda": ("fp16",)}
EVERY = [
    (graph, precision)
    for graph in RUNNABLE
    for precision in PRECISIONS.get(graph, ("fp32", "fp16", "bf16", "int8", "int4"))
]
CUTS = (0, 1, 8, 21)


def exported(folder, config, graph, precision):
    (folder / "checkpoint").mkdir()
    options = {"calibration_tokens": 0} if precision == "int4" and graph != "primitive" else {}
    return dijiang.export(
        write(folder / "checkpoint", config, trained=True),
        folder / "b",
        graph=graph,
        precision=precision,
        verify=False,
        **options,
    )


def run(model, ids):
    """Logits and states of ids [T] in pieces, and of the first token of each in a state of its own."""
    pieces, alone, calls = model.new_state(), model.new_state(), []
    for start, stop in pairwise(CUTS):
        calls.append(Call(ids[None, start:stop], pieces, []))
        calls.append(Call(ids[None, start : start + 1], alone))
    logits = list(through(model, calls))
    return [*logits, *(layer for call in calls for layer in call.after or ()), *alone.layers]


def emulated(bundle):
    return load_emulated(bundle, next(iter(bundle.manifest.graphs)))


def check(bundle):
    whole = emulated(bundle)
    assert not isinstance(whole, PartedModel)
    ids = np.random.default_rng(0).integers(0, whole.spec.vocab_size, CUTS[-1])
    expected = run(whole, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "PART_BYTES", 0)
        model = emulated(bundle)
    assert isinstance(model, PartedModel)
    # What comes before the layers, each of them, and the head.
    assert len(model.parts) >= model.spec.num_layers + 2
    for a, b in zip(run(model, ids), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("graph", "precision"), EVERY)
@pytest.mark.parametrize("name", NAMED)
def test_parts_have_every_bit_of_the_whole(name, graph, precision, tmp_path):
    check(exported(tmp_path, NAMED[name], graph, precision))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(config=configs(), kind=st.sampled_from(EVERY))
def test_parts_of_a_drawn_variant_have_every_bit_of_the_whole(config, kind):
    with tempfile.TemporaryDirectory() as name:
        check(exported(Path(name), config, *kind))


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_verify_in_parts_reports_what_it_reports_of_the_whole(precision, tmp_path, monkeypatch):
    """Text that it draws included."""
    bundle = exported(tmp_path, NAMED["llama-gqa-4"], RUNNABLE[0], precision).path
    whole = dijiang.verify(bundle, tmp_path / "checkpoint", tokens=12, store=False)
    monkeypatch.setattr(cut, "PART_BYTES", 0)
    assert dijiang.verify(bundle, tmp_path / "checkpoint", tokens=12, store=False) == whole


def test_a_drawn_text_is_short_where_each_token_loads_all_parts(tmp_path, monkeypatch):
    bundle = exported(tmp_path, NAMED["opt-125m-like"], RUNNABLE[0], "int8").path
    monkeypatch.setattr(cut, "PART_BYTES", 0)
    assert dijiang.verify(bundle, tmp_path / "checkpoint", store=False).tokens == 32


def test_bound_is_the_size_of_a_part(tmp_path):
    bundle = exported(tmp_path, NAMED["llama-gqa-4"], RUNNABLE[0], "fp32")
    graph = ir.load(onnx_file(bundle.path)).graph
    (whole,), each = cut.parts(graph), cut.parts(graph, 0)
    assert sum(part.nbytes for part in each) >= whole.nbytes  # small constants are in several
    two = cut.parts(graph, each[0].nbytes + each[1].nbytes)
    assert [part.nbytes <= each[0].nbytes + each[1].nbytes for part in two] == [True] * len(two)
    assert 1 < len(two) < len(each)


@pytest.mark.parametrize(("version", "cuts"), [("1.20.1", False), ("1.21.0", True), ("2.0.0rc1", True)])
def test_old_onnxruntime_has_the_whole_graph(tmp_path, monkeypatch, version, cuts):
    bundle = exported(tmp_path, NAMED["llama-gqa-4"], RUNNABLE[0], "fp32")
    monkeypatch.setattr(cut, "PART_BYTES", 0)
    monkeypatch.setattr(cut, "import_onnxruntime", lambda: SimpleNamespace(__version__=version))
    assert isinstance(emulated(bundle), PartedModel) == cuts


def test_a_step_that_fails_in_a_part_is_one_line(tmp_path, monkeypatch):
    bundle = exported(tmp_path, NAMED["llama-gqa-4"], RUNNABLE[0], "fp32")
    monkeypatch.setattr(cut, "PART_BYTES", 0)
    model = emulated(bundle)

    def fail(self, known):
        raise RuntimeError("no room\nfor anything")

    monkeypatch.setattr(parts.Loaded, "__call__", fail)
    state = model.new_state()
    with pytest.raises(dijiang.SessionError, match=r"failed in a step of 2 tokens \(no room\)"):
        model.forward([[1, 2]], state)
    assert state.position.tolist() == [0]


def test_emulated_parts_are_written_one_at_a_time_and_removed(tmp_path, monkeypatch):
    bundle, written = exported(tmp_path, NAMED["llama-gqa-4"], "ort", "fp16"), []

    def noted(bundle, graph, source, **options):
        written.append([file.stat().st_size for file in sorted(source.parent.iterdir())][1])
        assert len(list(temporary.iterdir())) == 1
        return load_graph(bundle, graph, source, **options)

    load_graph, temporary = parts.load_graph, tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(cut, "PART_BYTES", 0)
    monkeypatch.setattr(parts, "load_graph", noted)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    model = emulated(bundle)
    run(model, np.arange(CUTS[-1]))
    assert list(temporary.iterdir()) == []
    assert len(written) == len(model.parts)
    assert all(size <= part.nbytes for size, part in zip(written, model.parts, strict=True))


def test_verifying_in_parts_holds_one_part(tmp_path):
    checkpoint = write_random(CONFIG, tmp_path / "checkpoint")
    bundle = dijiang.export(checkpoint, tmp_path / "b", graph=RUNNABLE[0], verify=False).path
    command = ["verify", bundle, "--against", checkpoint, "--no-store", "--tokens", 16]
    # On a busy machine glibc's malloc gives threads that collide arenas of their own: a layer's worth, once.
    whole, split = (
        peak_anonymous(*command, code=BOUNDED.format(bound), MALLOC_ARENA_MAX="1") for bound in (10**9, 0)
    )
    # Where the parts have one layer each, one in float64, and what that is made from, is larger.
    layer = 12 * load_checkpoint(checkpoint).layer_parameters
    weights = (bundle / "model.onnx.data").stat().st_size
    assert whole - split > 0.9 * (weights - layer)
