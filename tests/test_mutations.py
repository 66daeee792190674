"""Tests of GPU sessions fail where our code is broken, although no GPU is there."""

import subprocess
import sys

import pytest

from tests.conftest import RUNNABLE


@pytest.mark.samples
@pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
def test_every_mutation_is_noticed_and_none_is_not():
    done = subprocess.run([sys.executable, "-m", "tests.mutate"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
