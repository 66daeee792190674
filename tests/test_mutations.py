"""Broken code is noticed: by tests of GPU sessions, although no GPU is there; and how random mutants are made."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import RUNNABLE
from tests.mutants.__main__ import ROOT, SITE, annotated, in_function, places
from tests.mutate import MUTATIONS


@pytest.mark.samples
@pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")
def test_every_mutation_is_noticed_and_none_is_not():
    done = subprocess.run([sys.executable, "-m", "tests.mutate"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_broken_on_purpose_is_in_our_code(name):
    """In every run of the tests: the mutations themselves run in `make samples`."""
    MUTATIONS[name].text()


def test_mutants_leave_annotations_alone():
    source = "def f(a: int | None = 1) -> int | str:\n    b: int | str = a | 2\n    return b\n"
    assert sorted(annotated(source)) == [((1, 9), (1, 19)), ((1, 28), (1, 37)), ((2, 7), (2, 16))]
    step = ROOT / "dijiang" / "runtime" / "step.py"
    changed = {
        step.read_text().splitlines()[start[0] - 1] for (start, _), name, _ in places(step) if "BitOr" in name
    }
    assert not any("mask: np.ndarray | None" in line for line in changed)


def test_what_runs_at_import_is_no_line_of_a_test():
    source = "x = 1\n\nclass A:\n    y = 2\n\n    @property\n    def z(self, w=3):\n        return w\n"
    found = [in_function(source, line, line) for line in range(1, 9)]
    assert found == [*[(0, -1)] * 5, (8, 8), (0, -1), (8, 8)]


def test_mutant_is_what_python_imports_and_the_file_stays(tmp_path):
    file = ROOT / "dijiang" / "version.py"
    before = file.read_bytes()
    (tmp_path / "code.py").write_text("__version__ = 'mutant'\n")
    told = json.dumps({"module": "dijiang.version", "file": str(file), "code": str(tmp_path / "code.py")})
    environment = os.environ | {"PYTHONPATH": str(SITE), "DIJIANG_MUTANT": told}
    code = "import dijiang.version as v, subprocess, sys; print(v.__version__, v.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["mutant", str(file)]
    assert file.read_bytes() == before


ATTEMPTS = """
from tests.mutate import MUTATIONS
from tests.mutants.__main__ import ROOT, attempt
source = (ROOT / "dijiang/typed.py").read_text()
for code in (source.replace("if not _fits(", "if _fits("), source + "# nothing"):
    mutant = {"file": "dijiang/typed.py", "place": [[1, 0], [1, 1]], "operator": "x", "code": code}
    print(attempt(mutant, ["tests/test_typed.py::test_declared_types_pass"])["outcome"])
"""


def test_mutant_is_killed_by_the_test_that_runs_its_line_and_a_comment_survives():
    """In a process of its own: the attempts are forked from it."""
    done = subprocess.run([sys.executable, "-c", ATTEMPTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["killed", "survived"]
