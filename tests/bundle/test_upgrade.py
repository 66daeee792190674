"""From format 1 to 2: one file is replaced, in one step."""

import json
import shutil

import numpy as np
import pytest

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.bundle.upgrade import upgrade
from tests.conftest import GOLDEN
from tests.kill import to_format_1


@pytest.fixture
def first(exported, copy_of):
    """A bundle of format 1, and the one of format 2 that it was."""
    second = exported("neox-base", graph="primitive")
    folder = copy_of(second)
    to_format_1(folder)
    return folder, second


def test_upgraded_bundle_computes_the_same_from_the_same_files(first):
    folder, second = first
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bundle = upgrade(folder)
    assert bundle.manifest == open_bundle(folder).manifest
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"dijiang.json"}
    found, expected = (dijiang.load(path) for path in (folder, second))
    logits = [m.forward([[1, 2, 3]], m.new_state()) for m in (found, expected)]
    np.testing.assert_array_equal(*logits)
    assert upgrade(folder).manifest == bundle.manifest


def test_damaged_bundle_of_format_1_is_left_as_it_is(first):
    folder, _ = first
    (folder / "model.onnx.data").write_bytes(b"x")
    with pytest.raises(dijiang.BundleError, match=r"model\.onnx\.data has another sha256"):
        upgrade(folder)
    assert json.loads((folder / "dijiang.json").read_text())["format_version"] == 1


def test_upgraded_bundle_can_be_replaced(first, tmp_path):
    folder, _ = first
    upgrade(folder)
    checkpoint = shutil.copytree(GOLDEN["neox-base"], tmp_path / "c")
    assert dijiang.export(checkpoint, folder, verify=False, force=True).path == folder
