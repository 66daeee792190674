"""Bundles of format 1 become bundles of format 2, without the checkpoint."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.bundle.upgrade import upgrade
from dijiang.cli import main
from tests.conftest import GOLDEN, RUNNABLE, Golden, onnx_file


def as_format_1(folder, graph, precision, target="onnxruntime"):
    """A bundle as dijiang 0.1 wrote it: one graph called model.onnx, whatever its form."""
    new = json.loads((folder / "dijiang.json").read_text())
    onnx_file(folder).rename(folder / "model.onnx")
    (folder / "parity.json").write_text(json.dumps({"passed": True, "logits": {"max_error": 1e-6}}))
    names = ["model.onnx", "model.onnx.data", "parity.json"]
    names += [name for name in new["files"] if name.startswith(("token", "special"))]
    record = next(iter(new["graphs"].values()))
    spec = new["spec"]
    old = {
        "spec": spec,
        "dialect": graph,
        "precision": precision,
        "decay": new["decay"],
        "positions_limit": new["positions_limit"],
        "limit_reason": new["limit_reason"],
        "in_place": record["in_place"],
        "state": {"layers": spec["num_layers"], "shape": [1, 2, 2], "dtype": "float32", "bytes": 16},
        "source_sha256": new["source_sha256"],
        "versions": new["versions"],
        "warnings": new["warnings"],
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
        "engines": {},
        "reads": record["reads"],
        "parameters": new["parameters"],
        "target": target,
        "format_version": 1,
    }
    (folder / "dijiang.json").write_text(json.dumps(old, indent=1) + "\n")
    return folder


@pytest.fixture
def old(exported, copy_of):
    return lambda graph, precision="fp32": as_format_1(
        copy_of(exported("neox-base", graph=graph, precision=precision)), graph, precision
    )


@pytest.mark.parametrize("graph", RUNNABLE)
def test_upgraded_bundle_computes_what_it_did(old, graph):
    folder = old(graph)
    with pytest.raises(dijiang.BundleError, match=r"bundle format 1, this dijiang reads 2; run dijiang upgrade"):
        dijiang.load(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    bundle = upgrade(folder)
    assert list(bundle.manifest.graphs) == [graph]
    assert bundle.passed is True
    assert bundle.parity["logits"]["max_error"] == 1e-6
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"dijiang.json"}  # one step
    golden, model = Golden.load("neox-base"), dijiang.load(folder)
    logits = model.forward(golden.ids, model.new_state(len(golden.ids)), all_logits=True)
    assert golden.error(logits) <= 1e-4
    assert dijiang.verify(folder, GOLDEN["neox-base"], tokens=20).same_source


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_upgraded_bundle_has_the_recipe_of_a_new_one(old, exported, precision):
    new = open_bundle(exported("neox-base", graph="ort", precision=precision)).manifest
    found = upgrade(old("ort", precision)).manifest
    assert (found.recipe.scheme, found.recipe.type) == (new.recipe.scheme, new.recipe.type)
    assert found.graphs["ort"].providers == new.graphs["ort"].providers
    if "ort" in RUNNABLE:
        model = dijiang.load(exported("neox-base", graph="ort", precision=precision))
        assert np.isfinite(model.forward([[1, 2]], model.new_state())).all()


def test_upgrading_twice_changes_nothing(old):
    folder = old("ort")
    upgrade(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    upgrade(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["weights", "no weights", "manifest", "outside", "unknown"])
def test_damaged_bundle_is_left_as_it_is(old, damage):
    folder = old("primitive")
    manifest = json.loads((folder / "dijiang.json").read_text())
    if damage == "weights":
        data = bytearray((folder / "model.onnx.data").read_bytes())
        data[9] ^= 1
        (folder / "model.onnx.data").write_bytes(data)
    elif damage == "no weights":
        (folder / "model.onnx.data").unlink()
    elif damage == "manifest":
        del manifest["spec"]
    elif damage == "outside":
        manifest["files"]["../secret"] = "0" * 64
    elif damage == "unknown":
        manifest["dialect"] = "latin"
    (folder / "dijiang.json").write_text(json.dumps(manifest))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(dijiang.BundleError, match="not a whole bundle of format 1"):
        upgrade(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_upgrade_from_the_command_line(old, tmp_path):
    done = CliRunner().invoke(main, ["upgrade", str(old("ort")), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["format_version"]) == (0, 2)
    missing = CliRunner().invoke(main, ["upgrade", str(tmp_path)])
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)


def test_failed_verdict_of_format_1_stays_failed(exported, copy_of):
    folder = as_format_1(copy_of(exported("neox-base", graph="primitive")), "primitive", "fp32")
    (folder / "parity.json").write_text(json.dumps({"passed": False, "logits": {"max_error": 1.0}}))
    old = json.loads((folder / "dijiang.json").read_text())
    old["files"]["parity.json"] = hashlib.sha256((folder / "parity.json").read_bytes()).hexdigest()
    (folder / "dijiang.json").write_text(json.dumps(old))
    assert upgrade(folder).passed is False


def test_bundle_of_0_1_0_is_upgraded_and_passes(copy_of):
    """As commit ac8b119 exported `neox-base` in int8: nothing in it is from a later dijiang."""
    folder = copy_of(Path(__file__).parent / "of-0.1.0")
    assert list(upgrade(folder).manifest.graphs) == ["ort"]
    if "ort" in RUNNABLE:
        assert dijiang.verify(folder, GOLDEN["neox-base"], tokens=20).passed
