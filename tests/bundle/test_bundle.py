"""Opening a bundle: every file whole, nothing outside the folder, formats known."""

import json

import pytest

import dijiang


@pytest.fixture
def bundle(exported, copy_of):
    return copy_of(exported("neox-base"))


def edit_manifest(folder, edit):
    path = folder / "dijiang.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_changed_byte_is_a_wrong_hash(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(dijiang.BundleError, match=rf"{name}: sha256 \w+\.\.\. from byte 0, expected"):
        dijiang.load(bundle)


def test_missing_file_is_named(bundle):
    (bundle / "model.onnx.data").unlink()
    with pytest.raises(dijiang.BundleError, match=r"model\.onnx\.data is missing"):
        dijiang.load(bundle)


def test_newer_format_asks_for_an_upgrade(bundle):
    edit_manifest(bundle, lambda m: m.update(format_version=99))
    with pytest.raises(dijiang.BundleError, match=r"bundle format 99, this dijiang reads \d.*upgrade"):
        dijiang.load(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "folder/file", ".."])
def test_path_that_leaves_the_folder_is_refused(bundle, name):
    (bundle.parent / "secret").write_text("x")
    edit_manifest(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": ["0" * 64]}}))
    with pytest.raises(dijiang.BundleError, match="leaves the bundle folder"):
        dijiang.load(bundle)


def test_link_that_leaves_the_folder_is_refused(bundle):
    outside = bundle.parent / "weights"
    (bundle / "model.onnx.data").rename(outside)
    (bundle / "model.onnx.data").symlink_to(outside)
    with pytest.raises(dijiang.BundleError, match="leaves the bundle folder"):
        dijiang.load(bundle)


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
        ("unknown", 1),
        ("recipe", {}),
        ("graphs", {}),
        ("graphs", {"native": {"file": "model.onnx"}}),
    ],
)
def test_manifest_with_a_wrong_entry_is_one_error(bundle, key, value):
    edit_manifest(bundle, lambda m: m.update({key: value}))
    with pytest.raises(dijiang.BundleError, match="not a whole manifest"):
        dijiang.load(bundle)


def test_manifest_without_the_graph_is_refused(bundle):
    edit_manifest(bundle, lambda m: m["files"].pop("model.onnx"))
    with pytest.raises(dijiang.BundleError, match=r"model\.onnx not in dijiang\.json"):
        dijiang.load(bundle)


def test_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(dijiang.BundleError, match=r"no dijiang\.json, so not a bundle"):
        dijiang.load(tmp_path)


def test_unchecked_load_skips_the_hashes_only(bundle):
    edit_manifest(bundle, lambda m: m["files"]["model.onnx.data"].update(sha256=["0" * 64]))
    assert dijiang.load(bundle, check_hashes=False).spec.num_layers > 0
