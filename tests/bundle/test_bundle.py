"""Opening a bundle: every file whole, nothing outside the folder, formats known."""

import os
import re
from dataclasses import fields
from functools import reduce
from operator import getitem
from types import SimpleNamespace

import numpy as np
import pytest

import dijiang
from dijiang.bundle import integrity
from dijiang.bundle.manifest import fingerprint_of
from dijiang.models.load import load_checkpoint
from dijiang.models.spec import ModelSpec
from tests.conftest import GOLDEN, RUNNABLE, edit_manifest, onnx_file


@pytest.fixture
def bundle(exported, copy_of):
    return copy_of(exported("neox-base"))


@pytest.mark.parametrize("name", ['fingerprint": "', 'source_sha256": "', 'bound": ', 'parameters": '])
def test_changed_bit_of_a_manifest_is_a_wrong_digest(bundle, name):
    """A fingerprint of another checkpoint would part a model from the states of all its bundles."""
    file = bundle / "dijiang.json"
    data = bytearray(file.read_bytes())
    data[data.index(name.encode()) + len(name)] ^= 1
    file.write_bytes(data)
    with pytest.raises(dijiang.BundleError, match="its contents are not what its digest says"):
        dijiang.load(bundle)


def test_manifest_of_before_has_no_digest(bundle):
    edit_manifest(bundle, lambda manifest: manifest.update(parameters=7))
    assert dijiang.load(bundle).manifest.parameters == 7


@pytest.mark.parametrize("graph", [True, False])
def test_changed_byte_is_a_wrong_hash(bundle, graph):
    file = onnx_file(bundle) if graph else bundle / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(dijiang.BundleError, match=rf"{file.name}: sha256 \w+\.\.\. from byte 0, expected"):
        dijiang.load(bundle)


def test_missing_file_is_named(bundle):
    (bundle / "model.onnx.data").unlink()
    with pytest.raises(dijiang.BundleError, match=r"model\.onnx\.data is missing"):
        dijiang.load(bundle)


def test_newer_format_asks_for_an_upgrade(bundle):
    edit_manifest(bundle, lambda m: m.update(format_version=99))
    with pytest.raises(dijiang.BundleError, match=r"bundle format 99, this dijiang reads \d.*upgrade"):
        dijiang.load(bundle)


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "a\nb", ""], ids=ascii)
def test_name_that_no_file_should_have_is_one_line(bundle, name, hashes):
    edit_manifest(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": ["0" * 64]}}))
    with pytest.raises(dijiang.BundleError, match=r"^[^\n]*leaves the bundle folder[^\n]*$"):
        dijiang.load(bundle, check_hashes=hashes)


@pytest.mark.parametrize("name", ["../../secret", "engine.plan"])
def test_engine_that_is_none_of_the_bundles_files_is_refused(bundle, name):
    """No hash would vouch for it."""
    record = {"file": name, "backend": "tensorrt", "version": "10.3", "gpus": ["sm90"]}
    (bundle / "engine.plan").write_bytes(b"x")
    edit_manifest(bundle, lambda m: m.update(engines={"tensorrt": record}))
    with pytest.raises(dijiang.BundleError, match=r"(secret|engine\.plan) not in dijiang\.json"):
        dijiang.load(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "folder/file", ".."])
def test_path_that_leaves_the_folder_is_refused(bundle, name):
    (bundle.parent / "secret").write_text("x")
    edit_manifest(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": ["0" * 64]}}))
    with pytest.raises(dijiang.BundleError, match="leaves the bundle folder"):
        dijiang.load(bundle)


def logits(bundle, graph):
    model = dijiang.load(bundle, graph=graph)
    return model.forward(np.array([[1, 2]]), model.new_state())


def moved(bundle, folder, files):
    """The bundle in another folder, of links to files that lie elsewhere under other names."""
    folder.mkdir(parents=True)
    files.mkdir(parents=True)
    for number, file in enumerate(sorted(bundle.iterdir())):
        there = file.rename(files / f"{number:040x}")
        (folder / file.name).symlink_to(os.path.relpath(there, folder))
    return folder


@pytest.mark.parametrize("graph", [graph for graph in RUNNABLE if graph != "onnx"])
def test_links_to_elsewhere_are_read_where_the_hashes_vouch_for_them(bundle, tmp_path, graph):
    expected = logits(bundle, graph)
    bundle = moved(bundle, tmp_path / "linked", tmp_path / "elsewhere")
    np.testing.assert_array_equal(logits(bundle, graph), expected)
    with pytest.raises(dijiang.BundleError, match="leaves the bundle folder"):
        dijiang.load(bundle, check_hashes=False)
    data = (bundle / "model.onnx.data").resolve()
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    with pytest.raises(dijiang.BundleError, match=r"model\.onnx\.data: sha256"):
        dijiang.load(bundle)


PLACES = {
    "the Hub's cache": ("models--org--m/snapshots/" + "a" * 40, "models--org--m/blobs"),
    "a volume": ("volume", "volume/..data"),
}


@pytest.mark.parametrize("place", PLACES)
def test_links_within_a_cache_or_a_folder_need_no_hashes(bundle, tmp_path, place):
    folder, files = (tmp_path / one for one in PLACES[place])
    found = moved(bundle, folder, files)
    assert dijiang.load(found, check_hashes=False).spec.num_layers > 0
    data = (found / "model.onnx.data").resolve()
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(dijiang.BundleError, match=r"model\.onnx\.data' leaves the bundle folder"):
        dijiang.load(found, check_hashes=False)


BROKEN = {
    "no json": lambda path: path.write_text("{"),
    "a list": lambda path: path.write_text("[]"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "empty object": lambda path: path.write_text("{}"),
    "format only": lambda path: path.write_text('{"format_version": 2}'),
    "deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifest_is_one_error(bundle, case):
    BROKEN[case](bundle / "dijiang.json")
    with pytest.raises(dijiang.BundleError, match=r"dijiang\.json: (unreadable|not a whole manifest)"):
        dijiang.load(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spec", {"family": "x"}),
        ("spec", 3),
        ("files", []),
        ("files", None),
        ("files", {"model.onnx": "0" * 64}),
        ("recipe", {}),
        ("graphs", {}),
        ("graphs", {"native": {"file": "model.onnx"}}),
        ("positions_limit", "x"),
        ("parameters", "x"),
        ("versions", [1]),
        ("engines", [1]),
    ],
)
def test_manifest_with_a_wrong_entry_is_one_error(bundle, key, value):
    edit_manifest(bundle, lambda m: m.update({key: value}))
    with pytest.raises(dijiang.BundleError, match="not a whole manifest"):
        dijiang.load(bundle)


@pytest.mark.parametrize(
    "part", [(), ("spec",), ("recipe",), ("recipe", "gates", 0), ("graphs", "native"), ("files", "model.onnx.data")]
)
def test_manifest_of_a_later_dijiang_says_so(bundle, part):
    edit_manifest(bundle, lambda m: reduce(getitem, part, m).update(later=1))
    name = re.escape(".".join(map(str, [*part, "later"])))
    with pytest.raises(
        dijiang.BundleError, match=rf"{name} is unknown to this dijiang, .* wrote it; upgrade dijiang$"
    ):
        dijiang.load(bundle)


@pytest.mark.parametrize("needed", [None, "x", "1.x", 3])
def test_graph_without_the_version_that_it_needs_is_one_error(bundle, needed):
    edit_manifest(bundle, lambda m: next(iter(m["graphs"].values())).update(onnxruntime=needed))
    with pytest.raises(dijiang.BundleError, match="not a whole manifest"):
        dijiang.load(bundle)


def test_file_that_cannot_be_read_is_one_error(bundle, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(integrity, "record_file", refuse)
    with pytest.raises(dijiang.BundleError, match=r"model\.\S+: unreadable \(Permission denied\)"):
        dijiang.load(bundle)


def test_manifest_without_the_graph_is_refused(bundle):
    file = onnx_file(bundle).name
    edit_manifest(bundle, lambda m: m["files"].pop(file))
    with pytest.raises(dijiang.BundleError, match=rf"{file} not in dijiang\.json"):
        dijiang.load(bundle)


def test_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(dijiang.BundleError, match=r"no dijiang\.json, so not a bundle"):
        dijiang.load(tmp_path)


def test_unchecked_load_skips_the_hashes_only(bundle):
    edit_manifest(bundle, lambda m: m["files"]["model.onnx.data"].update(sha256=["0" * 64]))
    assert dijiang.load(bundle, check_hashes=False).spec.num_layers > 0


def changed(value):
    """Another value of the type."""
    if isinstance(value, bool):
        return not value
    return value * 2 + 1 if isinstance(value, int | float) else [value]


@pytest.mark.parametrize("name", [field.name for field in fields(ModelSpec)])
def test_fingerprint_tells_every_fact_that_a_state_depends_on(name):
    facts = load_checkpoint(GOLDEN["neox-base"]).spec.to_dict()
    specs = (
        SimpleNamespace(to_dict=lambda found=found: found)
        for found in (facts, facts | {name: changed(facts[name])})
    )
    one, other = (fingerprint_of("tensors", spec, "exact") for spec in specs)
    assert (one == other) == (name in ("max_positions", "bos_token_id", "eos_token_ids"))
