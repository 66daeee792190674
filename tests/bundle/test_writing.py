"""What changes a bundle in place, or replaces it: through no link, and nothing is lost that is not its own."""

import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

import dijiang
from dijiang import hidden
from dijiang.bundle.opened import open_bundle
from tests.conftest import GOLDEN

BASE = GOLDEN["neox-base"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def bundle(exported, copy_of):
    return copy_of(exported("neox-base"))


def verify(bundle):
    return dijiang.verify(bundle, BASE, tokens=8)


@pytest.mark.parametrize(
    ("name", "link"),
    [
        *itertools.product(["parity.json", "dijiang.json"], ["symbolic", "hard"]),
        ("parity.json", "nowhere"),
    ],
)
def test_verify_writes_through_no_link(bundle, tmp_path, name, link):
    outside = tmp_path / "outside"
    if link != "nowhere":
        outside.write_bytes((bundle / name).read_bytes() if (bundle / name).exists() else b"{}")
    before = outside.read_bytes() if outside.exists() else None
    (bundle / name).unlink(missing_ok=True)
    (os.link if link == "hard" else os.symlink)(outside, bundle / name)
    verify(bundle)
    assert (outside.read_bytes() if outside.exists() else None) == before
    assert open_bundle(bundle).passed
    assert not (bundle / name).is_symlink()


def test_verify_never_opens_names_that_it_once_used(bundle, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in (".dijiang.json.tmp", ".parity.json.tmp"):
        (bundle / name).symlink_to(outside)
    verify(bundle)
    assert outside.read_text() == "mine"


def test_two_edits_of_a_manifest_lose_nothing(bundle):
    first, second = open_bundle(bundle), open_bundle(bundle)
    first.announced(["one"])
    second.announced(["two"])
    assert {"one", "two"} <= set(open_bundle(bundle).manifest.reports)


def test_edits_wait_for_each_other(bundle):
    opened, entered, done = open_bundle(bundle), threading.Event(), []

    def slow(manifest):
        entered.set()
        time.sleep(0.2)
        done.append("slow")
        return manifest

    thread = threading.Thread(target=lambda: opened.edited(slow))
    thread.start()
    entered.wait()
    opened.edited(lambda manifest: done.append("quick") or manifest)
    thread.join()
    assert done == ["slow", "quick"]


def test_bundle_that_was_replaced_meanwhile_is_not_edited(bundle, exported):
    opened = open_bundle(bundle)
    shutil.copytree(exported("tiny-python"), bundle, dirs_exist_ok=True)
    with pytest.raises(dijiang.BundleError, match="another bundle was written there meanwhile"):
        opened.announced(["one"])


@pytest.mark.parametrize("kind", ["file", "folder", "link", "listed folder"])
def test_force_deletes_nothing_that_the_manifest_does_not_list(bundle, tmp_path, kind):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    here = bundle / "chapter"
    if kind == "file":
        here.write_text("years of work")
    elif kind == "link":
        here.symlink_to(tmp_path / "thesis")
    else:
        shutil.copytree(tmp_path / "thesis", here)
    if kind == "listed folder":
        manifest = json.loads((bundle / "dijiang.json").read_text())
        manifest["reports"].append("chapter")
        (bundle / "dijiang.json").write_text(json.dumps(manifest))
    before = names(bundle)
    with pytest.raises(dijiang.ExportError, match="chapter is no part of the bundle there, and would be lost"):
        dijiang.export(BASE, bundle, verify=False, force=True)
    assert names(bundle) == before
    assert open_bundle(bundle).manifest


def test_force_never_deletes_the_checkpoint(tmp_path, bundle):
    checkpoint = Path(shutil.copytree(BASE, tmp_path / "outer" / "checkpoint"))
    for output in (checkpoint, checkpoint.parent):
        shutil.copyfile(bundle / "dijiang.json", output / "dijiang.json")
        with pytest.raises(dijiang.ExportError, match=r"is or holds .*, which is read"):
            dijiang.export(checkpoint, output, force=True)
    with pytest.raises(dijiang.ExportError, match=r"is or holds .*, which is read"):
        dijiang.export(checkpoint, bundle, text=bundle / "dijiang.json", force=True)
    assert (checkpoint / "model.safetensors").is_file()


def test_force_takes_what_a_killed_verify_left(bundle):
    (bundle / hidden.hidden_name("parity.json")).write_text("{")
    (bundle / hidden.hidden_name("tensorrt.engine")).mkdir()
    dijiang.export(BASE, bundle, verify=False, force=True)
    assert not [name for name in names(bundle) if name.startswith(".")]
