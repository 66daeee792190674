"""What sanitizers say of the kernels for GPUs; `make sanitize` looks at each of their barriers, and at the rest."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.samples
def test_threads_of_a_block_neither_race_nor_leave_their_memory(tmp_path):
    done = subprocess.run(
        ["tests/native/blocks.sh", tmp_path, sys.executable],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode == 75:
        pytest.skip("no sanitizers")
    assert done.returncode == 0, done.stdout
