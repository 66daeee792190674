"""Processes that write side by side, that get a signal, and that are killed."""

import json
import signal
import subprocess
import sys

import pytest

from dijiang.bundle.opened import open_bundle
from tests.conftest import GOLDEN

BASE = GOLDEN["neox-base"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def cli(*arguments, **options):
    command = [sys.executable, "-m", "dijiang", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("force", [False, True])
def test_two_exports_to_one_target_end_in_one_whole_bundle(tmp_path, force):
    target = tmp_path / "a" / "b"
    running = [cli("export", BASE, "-o", target, "--no-verify", *["--force"] * force) for _ in range(2)]
    errors = [process.communicate()[1] for process in running]
    codes = sorted(process.returncode for process in running)
    assert codes == ([0, 0] if force else [0, 1]), errors
    assert all("Traceback" not in error for error in errors)
    assert open_bundle(target).manifest
    assert names(target.parent) == ["b"]


#: Ends at the moment when a file of the bundle is about to get its name.
SIGNALLED = """
import os, sys
from dijiang.cli import main
number, at = int(sys.argv[1]), sys.argv[2]
def hook(event, arguments):
    if event == "open" and at in str(arguments[0]):
        os.kill(os.getpid(), number)
sys.addaudithook(hook)
main(sys.argv[3:])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("at", ["model.onnx.data", "dijiang.json", "parity.json"])
def test_signal_leaves_nothing_and_has_its_status(tmp_path, number, code, at):
    command = [sys.executable, "-c", SIGNALLED, str(int(number)), at, "export", BASE, "-o", tmp_path / "a" / "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == []


@pytest.mark.samples
def test_kills_at_every_file_event_leave_old_or_new():
    """A sample; `make kill` has more."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill", "--runs", "40"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["cases"].values()
    assert sum(case["kills"] for case in found) == 40
    assert all(case["kills"] for case in found)
