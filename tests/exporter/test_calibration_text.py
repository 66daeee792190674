"""What a bundle says of the text that it was calibrated on, and a verification on that text."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bundle.calibrated import CalibrationText
from dijiang.cli import main
from tests.conftest import EXAMPLES

TINY = EXAMPLES / "tiny-python"


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    text = (TINY / "held_out.txt").read_text(encoding="utf-8")
    for name, part in (("first.txt", text[: len(text) // 2]), ("second.txt", text[len(text) // 2 :])):
        (folder / name).write_text(part, encoding="utf-8")
    return folder


def test_verification_on_the_calibration_text_says_so(halves, tmp_path):
    options = {"precision": "int4", "calibration_tokens": 1024, "calibration_text": halves / "first.txt"}
    bundle = dijiang.export(TINY, tmp_path / "b", graph="ort", verify=False, **options)
    dijiang.verify(bundle.path, TINY, text=halves / "first.txt", tokens=1100)
    known = bundle.manifest.calibration
    assert (known.text, known.length, len(known.pieces)) == ("first.txt", 32, 32)
    stored = json.loads((bundle.path / "parity.json").read_text())
    assert stored["calibrated_on"] == 1024
    shown = CliRunner().invoke(main, ["inspect", str(bundle.path)]).output
    assert "on 1,024 tokens of first.txt" in shown
    assert "1,024 tokens are of the text that it was calibrated on: elsewhere it is further off" in shown
    call = ["verify", str(bundle.path), "--against", str(TINY), "--no-store", "--tokens", "200", "--text"]
    for name, warned in (("first.txt", True), ("second.txt", False)):
        told = CliRunner().invoke(main, [*call, str(halves / name)])
        assert told.exit_code == 0
        assert ("calibrated on" in told.output) == warned


def test_text_of_a_file_is_found_wherever_it_begins():
    ids = np.random.default_rng(0).integers(0, 99, 2000)
    known = CalibrationText.of("x", [ids[100:612].reshape(2, 256)])
    assert known.shared(ids) == 512
    assert known.shared(ids[105:]) == 512 - 32
    assert known.shared(ids[100:150]) == 32
    assert known.shared(ids[:100]) == 0
    assert CalibrationText.of("x", [ids[None, :10]]).shared(ids[5:50]) == 0


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (300, 256), (16_600, 16_384)])
def test_tokens_of_the_manifest_are_those_that_were_used(tmp_path, asked, used):
    """A sequence that would not be whole is left out, of drawn text, too."""
    bundle = dijiang.export(TINY, tmp_path / "b", precision="int4", calibration_tokens=asked, verify=False)
    assert bundle.manifest.recipe.calibration_tokens == used
    assert bundle.manifest.calibration is None
