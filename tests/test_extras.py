"""What the light runtime leaves out is named with the extra that brings it."""

import subprocess
import sys

import pytest

from dijiang.extras import EXTRAS
from tests.conftest import EXAMPLES

TINY = str(EXAMPLES / "tiny-python")
#: Command line -> the extra that it needs; {}: a bundle.
NEEDS = {
    "export": (["export", TINY, "-o", "new"], "export"),
    "verify": (["verify", "{}", "--against", TINY], "export"),
    "init": (["init", "pythia-70m", "-o", "new", "--dtype", "float32"], "export"),
    "bench --baseline": (
        ["bench", "{}", "-n", "1", "-p", "none", "-r", "1", "--baseline", "transformer"],
        "export",
    ),
    "inspect --draw": (["inspect", "{}", "--draw", "a.svg"], "export"),
    "deploy genai": (["deploy", "genai", "{}", "-o", "new"], "export"),
    "serve": (["serve", "{}"], "serve"),
}
#: Commands that need none: what they say then.
PLAIN = {"run": ["run", "{}", "-p", "x", "-n", "1"], "doctor": ["doctor"], "build": ["build", "{}"]}
CODE = """
import sys
sys.modules |= dict.fromkeys({modules!r})
from dijiang.cli import main
main(sys.argv[1:])
"""


def without(modules, words, folder):
    """A command where modules are not installed."""
    command = [sys.executable, "-c", CODE.format(modules=modules), *words]
    return subprocess.run(command, cwd=folder, input="x\n", capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", NEEDS)
def test_missing_extra_is_one_line_that_names_it(exported, tmp_path, command):
    words, extra = NEEDS[command]
    modules = [module for module, name in EXTRAS.items() if name == extra]
    words = [word.format(exported("tiny-python", precision="int8")) for word in words]
    done = without(modules, words, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.endswith(f"; pip install 'dijiang[{extra}]'\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", PLAIN)
def test_the_light_runtime_needs_no_extra(exported, tmp_path, command):
    words = [word.format(exported("tiny-python", precision="int8")) for word in PLAIN[command]]
    done = without([*EXTRAS], words, tmp_path)
    assert "dijiang[" not in done.stderr.replace("dijiang[tensorrt]", "")
    assert "Traceback" not in done.stderr


def test_python_hears_the_same():
    code = "import sys; sys.modules['onnx_ir'] = None; import dijiang; dijiang.export"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("dijiang.errors.InputError: ")
    assert done.stderr.endswith("; pip install 'dijiang[export]'\n")


def test_a_fault_of_ours_stays_a_traceback(tmp_path):
    done = without(["dijiang.runtime.model"], ["run", "x"], tmp_path)
    assert "Traceback" in done.stderr
