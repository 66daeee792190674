"""Nobody is told that a model ran, and nothing stays behind."""

import os
import subprocess
import sys

import pytest

from dijiang.environment import NO_TELEMETRY


@pytest.mark.parametrize("command", [["run", "-p", "def main(", "-n", "2"], ["inspect"], ["doctor"]], ids=" ".join)
def test_home_and_the_folder_for_temporary_files_stay_empty(exported, tmp_path, command):
    """onnxruntime 1.32 keeps a device's number in the one and a file of its session in the other."""
    verb, *options = command
    places = {name: str(tmp_path / name) for name in ("HOME", "TMPDIR")}
    for place in places.values():
        os.mkdir(place)
    environment = {name: value for name, value in os.environ.items() if name != NO_TELEMETRY} | places
    bundle = [str(exported("tiny-python"))] if verb != "doctor" else []
    done = subprocess.run(
        [sys.executable, "-m", "dijiang", verb, *bundle, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [os.listdir(place) for place in places.values()] == [[], []]
