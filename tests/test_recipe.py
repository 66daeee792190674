"""The tables: what they resolve to, and that a new row needs no other file."""

import json
from dataclasses import replace
from itertools import product

import generate
import numpy as np
import pytest

import dijiang
from dijiang.doctor.support import support
from dijiang.models import activations
from dijiang.recipe import (
    BLOCK,
    BLOCKS,
    GRAPHS,
    PRECISIONS,
    PROVIDERS,
    ROTATION,
    SCHEMES,
    TARGETS,
    Blocks,
    Provider,
    Recipe,
    by_target,
    named,
    resolve,
)
from dijiang.runtime.sessions import cpu
from tests.conftest import GOLDEN, RUNNABLE, Golden


@pytest.mark.parametrize(("precision", "target"), list(product(PRECISIONS, TARGETS)))
def test_every_precision_and_target_is_a_recipe_that_its_manifest_keeps(precision, target):
    recipe = resolve(precision, target=target)
    assert set(recipe.graphs) <= set(TARGETS[target].graphs)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    for graph in recipe.graphs:
        assert set(recipe.providers(graph)) <= set(PROVIDERS)
        assert recipe.onnxruntime(graph) >= GRAPHS[graph].onnxruntime


def test_a_target_need_not_have_a_graph_for_every_precision(monkeypatch):
    monkeypatch.setitem(TARGETS, "new", replace(TARGETS["onnxruntime"], graphs=("native",)))
    able = {name for name in PRECISIONS if "new" in by_target(name)}
    assert able == {name for name, row in PRECISIONS.items() if row.type in GRAPHS["native"].types}
    assert len(list(support())) == len(PROVIDERS) * len(PRECISIONS)
    assert "| `new` | `int8` | `native` |" in generate.bundles()


def test_graph_of_another_target_is_said_to_be():
    with pytest.raises(dijiang.ExportError, match="leave --graph out, or add --target cuda"):
        resolve("int8", graph="cuda")


@pytest.mark.parametrize("budget", [1e308, float("inf"), float("nan"), 0.0, -1.0])
def test_budget_of_no_size_is_one_line(budget):
    with pytest.raises(dijiang.ExportError, match="expected more than 0; give the MB"):
        resolve("int4", budget=budget)


def test_precisions_that_round_are_judged_by_what_rounding_costs():
    for row in PRECISIONS.values():
        bounds = {gate.metric: gate.bound for gate in row.gates}
        assert all(bound > 0 for bound in bounds.values())
        if row.body or row.type != "fp32":
            assert {"state_over_rounding", "error_over_rounding", "kl_over_rounding"} <= bounds.keys()


def test_blocks_of_a_matrix_are_whole_in_its_rotation():
    """Rotated are powers of two; a block lies in one of them, or is made of several."""
    assert BLOCK in BLOCKS
    assert all(block.bit_count() == 1 and (ROTATION % block == 0 or block % ROTATION == 0) for block in BLOCKS)


def test_rows_name_code_that_is_there():
    for row in GRAPHS.values():
        assert callable(named(row.layer))
    for row in SCHEMES.values():
        assert named(row.code)
    for row in PROVIDERS.values():
        assert callable(named(row.open))
    assert len({row.file for row in GRAPHS.values()}) == len(GRAPHS)


ALL = ("native", "ort", "webgpu", "primitive")


@pytest.mark.parametrize(
    ("runs", "precision", "graphs"),
    [
        (ALL, "fp32", ALL),
        (ALL, "int8", ("native", "ort", "webgpu")),
        (ALL, "fp16", ("ort",)),
        (("ort", "primitive"), "int4", ("ort",)),
        (("primitive",), "fp32", ("primitive",)),
        (("primitive",), "int8", ("primitive",)),
        ((), "fp32", ("native",)),
    ],
)
def test_a_bundle_holds_the_graphs_that_run_here_and_share_their_weights(runs, precision, graphs):
    assert resolve(precision, runs_here=runs.__contains__).graphs == graphs


@pytest.mark.parametrize(
    ("options", "body", "head", "embed"),
    [
        ({}, Blocks(4, 64, 64, 2), Blocks(8, 64, 64, 2), Blocks(4, 64, 0, 2)),
        ({"block_size": 32}, Blocks(4, 32, 64, 2), Blocks(8, 32, 64, 2), Blocks(4, 32, 0, 2)),
        ({"head_precision": "fp32"}, Blocks(4, 64, 64, 2), None, Blocks(4, 64, 0, 2)),
        (
            {"head_precision": "int4", "block_size": 128},
            Blocks(4, 128, 64, 2),
            Blocks(4, 128, 64, 2),
            Blocks(4, 128, 0, 2),
        ),
    ],
)
def test_head_and_blocks_are_what_was_asked_for(options, body, head, embed):
    recipe = resolve("int4", **options)
    assert (recipe.body, recipe.head, recipe.embed) == (body, head, embed)


@pytest.mark.parametrize("change", ["graphs", "scheme", "type", "body", "gates", "missing"])
def test_recipe_of_a_file_is_checked(change):
    data = json.loads(json.dumps(resolve("int8").to_dict()))
    wrong = {"graphs": ["latin"], "scheme": "os:system", "type": "fp7", "body": {"bits": 8}, "gates": [1]}
    if change == "missing":
        del data["precision"]
    else:
        data[change] = wrong[change]
    with pytest.raises(dijiang.BundleError, match="recipe: "):
        Recipe.from_dict(data)


# One row each.


def test_a_new_precision_is_one_row(tmp_path, monkeypatch):
    row = replace(PRECISIONS["int8"], body=Blocks(8, 32), head=Blocks(8, 64), help="8 bits in small blocks")
    monkeypatch.setitem(PRECISIONS, "int8-small", row)
    bundle = dijiang.export(GOLDEN["tiny-python"], tmp_path / "b", precision="int8-small", calibration_tokens=0)
    assert bundle.passed
    assert bundle.manifest.recipe.body == Blocks(8, 32)
    plain = dijiang.export(
        GOLDEN["tiny-python"], tmp_path / "c", precision="int8", calibration_tokens=0, verify=False
    )
    assert bundle.data_bytes != plain.data_bytes
    model = dijiang.load(bundle.path)
    assert next(model.generate("def ", max_tokens=1)).token >= 0


class Counting(cpu.CpuSession):
    """A session that is not one of ours."""

    steps = 0

    def run(self, step, state):
        Counting.steps += 1
        return super().run(step, state)


def open_counting(bundle, graph, detail, device, options):
    assert (detail, device) == ("a detail", 3)
    return Counting(bundle, graph, threads=options.threads)


def test_a_new_provider_is_one_row(tmp_path, monkeypatch):
    row = Provider("tests.test_recipe:open_counting", ("ort", "primitive"), ("floats",), detail="a detail")
    monkeypatch.setitem(PROVIDERS, "tpu", row)
    bundle = dijiang.export(GOLDEN["neox-base"], tmp_path / "b", verify=False)
    model, golden = dijiang.load(bundle.path, provider="tpu:3"), Golden.load("neox-base")
    assert model.graph in ("ort", "primitive")
    logits = model.forward(golden.ids, model.new_state(len(golden.ids)), all_logits=True)
    assert golden.error(logits) <= 1e-4
    assert Counting.steps == 1


def test_a_new_activation_is_one_row(edit_config, tmp_path, monkeypatch):
    """Without a function in the operator: the native graph writes its nodes."""

    def nodes(b, x):
        return b.op("Mul", x, b.op("Mul", b.op("Relu", x), b.constant(0.5)))

    row = activations.Activation(lambda x: 0.5 * x * np.maximum(x, 0), nodes, nodes)
    monkeypatch.setitem(activations.ACTIVATIONS, "half_square", row)
    checkpoint = edit_config("neox-base", hidden_act="half_square")
    bundle = dijiang.export(checkpoint, tmp_path / "b")  # every graph meets its gate
    assert bundle.passed
    assert set(bundle.manifest.graphs) == set(RUNNABLE) - {"onnx"}
