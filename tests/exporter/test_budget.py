"""A size budget of int4: what it is spent on, and that bundles, manifests and refusals say so."""

import json
import re
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import dijiang
from dijiang.bench.transformer import build_transformer
from dijiang.bundle.opened import open_bundle
from dijiang.cli import main
from dijiang.exporter import budget, pipeline
from dijiang.exporter.budget import Candidate, chosen
from dijiang.exporter.calibration import LayerMoments, feeds_of
from dijiang.exporter.save import data_bytes
from dijiang.graph.passes.linear import array_of, linears
from dijiang.graph.roles import Role
from dijiang.models.load import load_checkpoint
from dijiang.parity.difference import Sums
from dijiang.recipe import Budget, Recipe, resolve, with_budget
from dijiang.runtime.sessions.inference import open_inference
from tests.conftest import EXAMPLES, GOLDEN, RUNNABLE, edit_manifest, graphs_of, onnx_file
from tests.graph.test_families import NAMED
from tests.random_models import write

pytestmark = pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
TINY = EXAMPLES / "tiny-python"
#: Bytes of the weights of tiny-python in int4: with every projection in 4 bits, and in 8.
SMALLEST, LARGEST = 2_629_120, 4_066_816
TOKENS = 512


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    target = tmp_path_factory.mktemp("budget") / "b"
    return dijiang.export(TINY, target, precision="int4", budget=3.0, calibration_tokens=TOKENS, verify=False)


# What is chosen.


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), max_size=12),
    st.integers(0, 60),
)
def test_chosen_projections_fit_and_nothing_worth_more_was_left_out_for_them(found, spare):
    candidates = [Candidate(str(i), more, change) for i, (more, change) in enumerate(found)]
    kept = chosen(candidates, spare)
    taken = {one.name: one.more for one in candidates if one.name in kept}
    assert sum(taken.values()) <= spare
    for left in (one for one in candidates if one.name not in kept):
        worth = left.change / left.more
        before = sum(one.more for one in candidates if one.name in kept and one.change / one.more >= worth)
        assert before + left.more > spare, "there was room for it"


def test_budget_of_everything_keeps_everything():
    candidates = [Candidate("a", 5, 0.0), Candidate("b", 3, 2.0)]
    assert chosen(candidates, 8) == ["b", "a"]
    assert chosen(candidates, 0) == []


# What is measured.


def passed_on(model, ids, weights, folder):
    """The head's inputs [N, T, hidden] of the whole float32 graph in one session, with these weights in it."""
    graph = pipeline.float_graph(model)
    (head,) = (x for x in linears(graph.graph) if x.role is Role.HEAD)
    head.input.type = ir.TensorType(ir.DataType.FLOAT)
    graph.graph.outputs.append(head.input)
    for name, weight in weights.items():
        graph.graph.initializers[name].const_value = ir.tensor(weight, name=name)
    ir.save(graph, folder / "model.onnx")
    session = open_inference(folder / "model.onnx")
    return session.run([head.input.name], feeds_of(graph, [ids])[0])[0].astype(np.float64)


@pytest.mark.parametrize("config", ["neox-parallel", "neox-sequential-tied", "opt-350m-like", "llama-gqa-4"])
def test_change_is_that_of_what_a_layer_passes_on(config, tmp_path):
    """Of the last layer the head reads it, or what is made of it by a projection behind the layers."""
    config = NAMED[config]
    model = load_checkpoint(write(tmp_path, config, trained=True, seed=3))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (3, 9))
    graph = pipeline.float_graph(model)
    *_, last = (x for x in linears(graph.graph) if x.role is Role.PROJECTION)
    name, weight = str(last.weight.name), array_of(last.weight)
    other = weight + np.random.default_rng(1).normal(scale=0.01, size=weight.shape).astype(np.float32)
    graph = pipeline.float_graph(model)
    moments = LayerMoments(graph, feeds_of(graph, [ids]), replaceable=True)
    moments(name)
    assert moments.change(name, weight) == 0
    old, new = (passed_on(model, ids, {name: w}, tmp_path) for w in (weight, other))
    expected = (((new - old) ** 2).sum(-1) / (old**2).sum(-1)).mean()
    found = moments.change(name, other)
    assert found == pytest.approx(expected, rel=1e-3)
    assert moments.change(name, weight + 2 * (other - weight)) > 2 * found


def kl_of(path, exact):
    """Mean KL of a bundle's logits from those of the float32 one, on four windows of the held-out text."""
    model, sums = dijiang.load(path), Sums()
    text = (TINY / "held_out.txt").read_text(encoding="utf-8")
    for window in np.array(exact.tokenizer.encode(text)[:2048]).reshape(4, 1, 512):
        rows = [m.forward(window, m.new_state(), all_logits=True)[0] for m in (exact, model)]
        sums.add(*rows, window[0])
    return sums.result(is_text=True).kl


def test_what_is_measured_is_worth_more_than_its_opposite(bundle, exported, tmp_path, monkeypatch):
    """On about as many bytes."""

    def least(candidates, spare):
        return chosen([replace(one, change=-one.change) for one in candidates], spare)

    monkeypatch.setattr(budget, "chosen", least)
    opposite = dijiang.export(
        TINY, tmp_path / "b", precision="int4", budget=3.0, calibration_tokens=TOKENS, verify=False
    )
    assert abs(opposite.data_bytes - bundle.data_bytes) < 0.02 * bundle.data_bytes
    exact = dijiang.load(exported("tiny-python"))
    assert kl_of(bundle.path, exact) < 0.75 * kl_of(opposite.path, exact)


# What is written.


def test_bundle_keeps_to_its_budget_and_says_what_it_was_spent_on(bundle, exported):
    recipe = bundle.manifest.recipe
    kept = recipe.budget.kept
    assert kept
    assert recipe.budget == Budget(3_000_000, recipe.head, kept)
    assert SMALLEST < bundle.data_bytes <= 3_000_000
    sizes, more = {}, 0
    for graph in recipe.graphs:
        nodes = onnx.load(onnx_file(bundle.path, graph), load_external_data=False).graph.node
        for node in (node for node in nodes if node.op_type in ("MatMul", "MatMulNBits")):
            attributes = {a.name: a.i for a in node.attribute}
            if "bits" in attributes:
                name = node.input[1].removesuffix(".codes")
                assert sizes.setdefault(name, attributes["bits"]) == attributes["bits"], "graphs share weights"
                more += attributes["K"] * attributes["N"] // 2 if name in kept else 0
    assert {name for name, bits in sizes.items() if bits == 8} == {*kept, "head.weight"}
    assert bundle.data_bytes == SMALLEST + more // len(recipe.graphs)
    plain = open_bundle(exported("tiny-python", precision="int4"))
    for name, record in bundle.manifest.graphs.items():
        reads = plain.manifest.graphs[name].reads
        assert record.reads["step"] - reads["step"] == bundle.data_bytes - plain.data_bytes
        assert record.reads["token"] == reads["token"]


def test_every_graph_meets_its_gates(bundle):
    assert dijiang.verify(bundle.path, TINY, text=TINY / "held_out.txt", tokens=1024).passed
    assert open_bundle(bundle.path).passed


def export_small(folder, size):
    """A small model within so many bytes."""
    options = {"precision": "int4", "budget": size / 1e6, "calibration_tokens": 64, "verify": False}
    return dijiang.export(GOLDEN["neox-base"], folder, **options)


@pytest.fixture(scope="module")
def sizes():
    """Of that model: the smallest and the largest budget, and the projections."""
    recipe, graphs = graphs_of(
        load_checkpoint(GOLDEN["neox-base"]), resolve("int4", runs_here=RUNNABLE.__contains__)
    )
    recipe = with_budget(recipe, 1)
    candidates = budget.candidates_of(recipe, pipeline.float_graph(load_checkpoint(GOLDEN["neox-base"])))
    smallest = data_bytes(graphs)
    return smallest, smallest + sum(one.more for one in candidates), [one.name for one in candidates]


def test_budget_is_spent_alike_each_time(sizes, tmp_path):
    smallest, largest, _ = sizes
    first, second = (export_small(tmp_path / name, (smallest + largest) // 2).manifest for name in "ab")
    assert first.recipe == second.recipe
    assert first.files == second.files
    assert first.recipe.budget.kept


@pytest.mark.parametrize("share", [0, 1], ids=["smallest", "largest"])
def test_smallest_and_largest_budget_are_met(share, sizes, tmp_path):
    *ends, names = sizes
    found = export_small(tmp_path / "b", ends[share])
    assert found.data_bytes == ends[share]
    assert set(found.manifest.recipe.budget.kept) == set(names[: share * len(names)])


def test_refused_size_that_is_given_back_is_taken(sizes, tmp_path):
    """The sizes of the message are within the bounds, rounded as they are."""
    with pytest.raises(dijiang.ExportError) as refused:
        export_small(tmp_path / "b", 1)
    said = [float(size) for size in re.findall(r"[\d.]+(?= \(every)|[\d.]+(?= MB \(in)", str(refused.value))]
    assert said == pytest.approx([size / 1e6 for size in sizes[:2]], abs=1e-3)
    for size in said:
        export_small(tmp_path / str(size), size * 1e6)


def test_budget_for_a_gpu(tmp_path):
    """Activations in 16 bits, the embedding as it is."""
    found = dijiang.export(
        GOLDEN["neox-base"], tmp_path / "a", precision="int4", target="cuda", calibration_tokens=64, verify=False
    )
    size = found.data_bytes / 1e6 * 1.05
    spent = dijiang.export(
        GOLDEN["neox-base"],
        tmp_path / "b",
        precision="int4",
        target="cuda",
        budget=size,
        calibration_tokens=64,
        verify=False,
    )
    assert found.data_bytes < spent.data_bytes <= size * 1e6
    assert dijiang.verify(spent.path, GOLDEN["neox-base"]).passed


def test_card_and_inspect_name_the_budget(bundle):
    title = f"int4 within 3.0 MB: {len(bundle.manifest.recipe.budget.kept)} projections in 8 bits"
    assert f"| precision | {title} |" in (bundle.path / "README.md").read_text()
    assert title in " ".join(CliRunner().invoke(main, ["inspect", str(bundle.path)]).output.split())
    found = json.loads(CliRunner().invoke(main, ["inspect", str(bundle.path), "--json"]).output)
    assert found["recipe"]["budget"]["kept"] == list(bundle.manifest.recipe.budget.kept)


def test_baseline_of_a_budget_is_plain(bundle, exported, tmp_path):
    sides = []
    for name, path in (("spent", bundle.path), ("plain", exported("tiny-python", precision="int4"))):
        (tmp_path / name).mkdir()
        sides.append(build_transformer(name, open_bundle(path), tmp_path / name, 64))
    assert sides[0].traffic == sides[1].traffic


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32"}, r"a budget has no meaning in precision fp32 .*use --precision int4"),
        ({"precision": "int8"}, r"a budget has no meaning in precision int8"),
        ({"precision": "fp16"}, r"a budget has no meaning in precision fp16"),
        ({"target": "tensorrt"}, r"a budget has no meaning in precision int4 and the primitive graph"),
        ({"calibration_tokens": 0}, r"this export has none; add --calibration-tokens 4096"),
        ({"budget": 0.0}, r"budget 0\.0 MB, expected more than 0"),
        ({"budget": -1.0}, r"budget -1\.0 MB, expected more than 0"),
        ({"budget": float("nan")}, r"budget nan MB, expected more than 0"),
        ({"budget": float("inf")}, r"budget inf MB, expected more than 0"),
        (
            {"budget": SMALLEST / 1e6 - 1e-6},
            r"budget 2\.629119 MB, expected 2\.630 \(every projection in 4 bits\) to 4\.066 MB \(in 8\)",
        ),
        ({"budget": LARGEST / 1e6 + 1e-6}, r"budget 4\.066817 MB, expected 2\.630 .* to 4\.066 MB"),
    ],
)
def test_budget_that_cannot_be_met_is_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "calibrate", None)  # nothing is calibrated for it
    with pytest.raises(dijiang.ExportError, match=message) as refused:
        dijiang.export(TINY, tmp_path / "b", **{"precision": "int4", "budget": 3.0} | options)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        *(
            (wrong, r"not a whole manifest \((?!its contents)")
            for wrong in (3, [], {"bytes": 1}, {"bytes": "1", "blocks": {"bits": 8, "block": 64}, "kept": []})
        ),
        ({"other": 1}, "recipe.budget.other is unknown to this dijiang"),
        ({"blocks": {"other": 1}}, "recipe.budget.blocks.other is unknown to this dijiang"),
    ],
)
def test_budget_of_a_file_is_checked(bundle, wrong, why, copy_of):
    folder = copy_of(bundle.path)
    edit_manifest(folder, lambda manifest: manifest["recipe"].update(budget=wrong))
    with pytest.raises(dijiang.BundleError, match=rf"dijiang\.json: {why}"):
        open_bundle(folder)


def test_recipe_from_before_budgets_has_none():
    data = json.loads(json.dumps(resolve("int4").to_dict()))
    assert data.pop("budget") is None
    assert Recipe.from_dict(data) == resolve("int4")
