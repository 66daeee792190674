"""Who made a bundle: signatures by OpenSSH over the manifest."""

import codecs
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.cli import main
from dijiang.environment import SIGNERS
from dijiang.errors import BundleError, InputError
from tests.conftest import GOLDEN, edit_manifest, signed
from tests.kill import to_format_1

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
BASE = GOLDEN["neox-base"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Files of private keys by name; the public ones stand beside them."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(command, check=True)
    return folder


@pytest.fixture
def bundle(exported, copy_of, keys):
    """A bundle with a signature by `ours`."""
    folder = copy_of(exported("neox-base"))
    open_bundle(folder).signed(keys / "ours")
    return folder


def refused(bundle, keys, text="its signature is by no key"):
    before = (bundle / "dijiang.json").read_bytes()
    with pytest.raises(BundleError, match=text):
        dijiang.load(bundle, require_signature=str(keys / "ours.pub"))
    assert (bundle / "dijiang.json").read_bytes() == before


def test_signed_bundle_is_opened_where_its_key_is_asked_for(bundle, keys):
    model = dijiang.load(bundle, require_signature=str(keys / "ours.pub"))
    assert model.forward([[1, 2]], model.new_state()).shape == (1, model.spec.vocab_size)
    both = keys / "both"
    both.write_text("# two\n\n" + (keys / "theirs.pub").read_text() + (keys / "ours.pub").read_text())
    open_bundle(bundle, require_signature=both)
    open_bundle(bundle)


def test_file_of_keys_may_begin_with_a_byte_order_mark(bundle, keys):
    file = keys / "bom.pub"
    file.write_bytes(codecs.BOM_UTF8 + (keys / "ours.pub").read_bytes())
    assert open_bundle(bundle, require_signature=file)


def test_other_key_no_signature_and_what_is_none_are_refused(bundle, keys, exported):
    with pytest.raises(BundleError, match=r"its signature is by no key of .*theirs\.pub"):
        open_bundle(bundle, require_signature=keys / "theirs.pub")
    with pytest.raises(BundleError, match="not signed, expected a signature by a key of"):
        open_bundle(exported("neox-base"), require_signature=keys / "ours.pub")
    for junk in ("", "x", "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"):
        edit_manifest(bundle, lambda manifest, junk=junk: manifest.update(signature=junk))
        refused(bundle, keys)
    for junk in (3, "x" * 10_001, "\ud800", []):
        edit_manifest(bundle, lambda manifest, junk=junk: manifest.update(signature=junk))
        refused(bundle, keys, "not a whole manifest")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(positions_limit=5),
        lambda m: m["spec"].update(eos_token_ids=[1]),
        lambda m: m["recipe"].update(gates=[]),
        lambda m: m["files"].pop("README.md", None) or m["files"].update(x={"bytes": 0, "sha256": []}),
        lambda m: m.update(warnings=["all is well"]),
        lambda m: (graph := next(iter(m["graphs"].values()))).update(in_place=not graph["in_place"]),
        lambda m: m.update(engines={"tensorrt": {"file": "x"}}),
    ],
    ids=["limit", "spec", "gates", "files", "warnings", "graph", "engines"],
)
def test_changed_manifest_is_refused(bundle, keys, edit):
    edit_manifest(bundle, edit)
    refused(bundle, keys)


def test_changed_file_is_refused_with_its_old_and_with_its_new_hash(bundle, keys):
    data = bundle / "model.onnx.data"
    with data.open("r+b") as stream:
        stream.write(b"\1")
    for check_hashes in (True, False):
        with pytest.raises(BundleError, match="sha256"):
            dijiang.load(bundle, check_hashes=check_hashes, require_signature=str(keys / "ours.pub"))
    signed(bundle, data)
    open_bundle(bundle)
    refused(bundle, keys)


def test_signature_of_another_bundle_or_for_another_use_is_refused(bundle, keys, exported, copy_of):
    other = copy_of(exported("neox-trained-2048"))
    signature = open_bundle(bundle).manifest.signature
    edit_manifest(other, lambda manifest: manifest.update(signature=signature))
    refused(other, keys)
    command = ["ssh-keygen", "-Y", "sign", "-f", str(keys / "ours"), "-n", "file"]
    part = open_bundle(bundle).manifest.signed_part()
    mail = subprocess.run(command, input=part, capture_output=True, check=True).stdout.decode()
    edit_manifest(bundle, lambda manifest: manifest.update(signature=mail))
    refused(bundle, keys)


def test_verify_keeps_the_signature_and_its_report_may_change(bundle, keys):
    report = dijiang.verify(bundle, BASE, tokens=8, require_signature=keys / "ours.pub")
    assert report.passed
    assert open_bundle(bundle, require_signature=keys / "ours.pub").passed
    (bundle / "parity.json").write_text("{}")
    (bundle / "README.md").write_text("mine")
    open_bundle(bundle, require_signature=keys / "ours.pub")


def test_edit_of_what_was_signed_takes_the_signature_away(bundle, keys):
    from dataclasses import replace

    changed = open_bundle(bundle).edited(lambda m: replace(m, warnings=("new",)))
    assert changed.manifest.signature is None
    refused(bundle, keys, "not signed")


def test_only_what_was_opened_and_checked_is_signed(bundle, keys):
    opened = open_bundle(bundle)
    edit_manifest(bundle, lambda manifest: manifest.update(positions_limit=5))
    with pytest.raises(BundleError, match="changed meanwhile"):
        opened.signed(keys / "theirs")


def test_export_signs_and_force_replaces_by_what_it_is_told(tmp_path, keys, monkeypatch):
    options = {"graph": "primitive", "verify": False}
    dijiang.export(BASE, tmp_path / "b", sign=keys / "ours", **options)
    open_bundle(tmp_path / "b", require_signature=keys / "ours.pub")
    monkeypatch.setenv(SIGNERS, str(keys / "ours.pub"))  # what is written here need not be signed
    dijiang.export(BASE, tmp_path / "b", force=True, **options)
    refused(tmp_path / "b", keys, "not signed")
    with pytest.raises(InputError, match="nowhere: does not sign"):
        dijiang.export(BASE, tmp_path / "c", sign=tmp_path / "nowhere", **options)
    assert not (tmp_path / "c").exists()


def test_upgraded_bundle_is_not_signed(exported, copy_of, keys):
    from dijiang.bundle.upgrade import upgrade

    old = copy_of(exported("neox-base", graph="primitive"))
    to_format_1(old)
    upgrade(old)
    refused(old, keys, "not signed")
    open_bundle(old).signed(keys / "ours")
    open_bundle(old, require_signature=keys / "ours.pub")


def test_environment_asks_of_every_verb(bundle, keys, exported, monkeypatch, tmp_path):
    monkeypatch.setenv(SIGNERS, str(keys / "ours.pub"))
    plain = str(exported("neox-base"))
    verbs = (
        ["inspect"],
        ["verify", "--against", str(BASE)],
        ["run", "-p", "x"],
        ["deploy", "triton", "-o", str(tmp_path / "t")],
        ["build"],
    )
    for verb, *rest in verbs:
        place = 1 if verb == "deploy" else 0
        done = CliRunner().invoke(main, [verb, *rest[:place], plain, *rest[place:]])
        assert (done.exit_code, "not signed" in done.stderr) == (1, True), (verb, done.output, done.stderr)
    assert CliRunner().invoke(main, ["inspect", str(bundle)]).exit_code == 0


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_load_takes_the_file_of_keys_as_text_or_path(bundle, keys, kind):
    assert dijiang.load(bundle, require_signature=kind(keys / "ours.pub")).spec.num_layers
    with pytest.raises(BundleError, match="its signature is by no key"):
        dijiang.load(bundle, require_signature=kind(keys / "theirs.pub"))


def test_command_line_signs_and_asks(exported, copy_of, keys):
    folder = copy_of(exported("neox-base"))
    done = CliRunner().invoke(main, ["sign", str(folder), "--key", str(keys / "theirs")])
    assert done.exit_code == 0, done.stderr
    assert "--require-signature checks it" in done.stdout
    for name, status in (("theirs", 0), ("ours", 1)):
        asked = ["verify", str(folder), "--against", str(BASE), "--tokens", "8", "--no-store"]
        asked += ["--require-signature", str(keys / f"{name}.pub")]
        assert CliRunner().invoke(main, asked).exit_code == status, name


def test_name_beside_a_public_key_may_have_any_letters_in_any_locale(bundle, keys, tmp_path):
    signers = tmp_path / "signers"
    signers.write_text((keys / "ours.pub").read_text().replace("ours", "josé@härz"), encoding="utf-8")
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "dijiang", "verify", bundle, "--against", BASE, "--tokens", "8", "--no-store"]
    done = subprocess.run(
        [*command, "--require-signature", signers], env=ascii_only, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [None, "", "x\n", "-----BEGIN OPENSSH PRIVATE KEY-----\n", b"\xff\xfe"])
def test_file_without_a_public_key_is_an_error_also_for_unsigned_bundles(exported, tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="public key"):
        open_bundle(exported("neox-base"), require_signature=file)


def test_line_of_the_keys_cannot_say_more_than_a_key(bundle, keys, tmp_path):
    """Options before a key, which ssh-keygen would obey, make the line none."""
    key = (keys / "ours.pub").read_text()
    (tmp_path / "keys").write_text('namespaces="*" ' + key)
    with pytest.raises(InputError, match="no public key"):
        open_bundle(bundle, require_signature=tmp_path / "keys")


def test_missing_openssh_is_one_line(bundle, keys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="install OpenSSH's client"):
        open_bundle(bundle, require_signature=keys / "ours.pub")
    open_bundle(bundle)
