"""What Python asks the library, and what it says to an instruction set that cannot be had."""

import os
import subprocess
import sys

import numpy as np
import pytest

import dijiang
from dijiang.models.activations import ACTIVATIONS
from dijiang.runtime import operators as native
from tests.conftest import EXAMPLES
from tests.native.steps import activated, call

compiled = pytest.mark.skipif(native.find_library() is None, reason="no compiled operator")


def library():
    return native.open_library(native.find_library())


@compiled
def test_numbers_for_an_export_without_the_library_are_the_librarys():
    names = library().dijiang_activation_names().decode().split()
    numbers = {name: library().dijiang_activation_number(name.encode()) for name in names}
    assert numbers == native.ACTIVATION_NUMBERS
    assert library().dijiang_longest_head() == native.LONGEST_HEAD


def test_numbers_that_graphs_store_never_change():
    """Further ones may come."""
    assert {"relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}.items() <= native.ACTIVATION_NUMBERS.items()


@compiled
@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if row.operator])
def test_operator_computes_what_python_does(name):
    row, x = ACTIVATIONS[name], np.linspace(-20, 20, 501, dtype=np.float32)
    y = np.empty_like(x)
    assert call("activation", native.activation_number(row.operator), x, y, len(x)) == 0
    assert np.abs(y - row.function(x.astype(np.float64))).max() <= 4e-6


@pytest.mark.parametrize("installed", [pytest.param(True, marks=compiled), False], ids=["library", "none"])
def test_unknown_activation_has_no_number(monkeypatch, installed):
    if not installed:
        monkeypatch.setattr(native, "FILE", "_absent.so")
    assert (native.find_library() is not None) == installed
    with pytest.raises(KeyError, match="swish"):
        native.activation_number("swish")
    assert native.longest_head() == 512


@compiled
@pytest.mark.parametrize("name", native.ACTIVATION_NUMBERS)
@pytest.mark.parametrize("n", [1, 63, 500])
def test_activation_meets_float64(name, n):
    x = np.linspace(-20, 20, n, dtype=np.float32)
    y = np.empty_like(x)
    assert call("activation", native.activation_number(name), x, y, n) == 0
    assert np.abs(y - activated(name, x.astype(np.float64))).max() <= 4e-6


@compiled
@pytest.mark.parametrize("number", [0, 99, -1])
def test_activation_without_a_function_touches_nothing(number):
    x, y = np.ones(3, np.float32), np.full(3, 7, np.float32)
    assert call("activation", number, x, y, 3) == -1
    assert (y == 7).all()


@compiled
def test_best_set_is_used_unless_one_is_forced():
    assert native.isa_names()[-1] == "plain"
    assert native.isa() == os.environ.get("DIJIANG_ISA", native.isa_names()[0])


def python(code, isa):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DIJIANG_ISA": isa},
        capture_output=True,
        text=True,
    )


@compiled
@pytest.mark.parametrize(
    ("isa", "reason"),
    [
        ("avx3", "DIJIANG_ISA=avx3 is no instruction set, expected one of: "),
        # Of the other processor family, so lacking on every machine.
        (
            "avx2" if "neon" in native.isa_names() else "neon",
            "is an instruction set that this processor lacks, expected one of: ",
        ),
    ],
    ids=["misspelt", "lacking"],
)
def test_set_that_cannot_be_had_is_one_line_everywhere(exported, isa, reason):
    bundle = exported("neox-base", graph="native")
    loaded = python(f"import dijiang; dijiang.load({str(bundle)!r})", isa)
    assert "the operator of the native graph: DIJIANG_ISA=" in loaded.stderr.splitlines()[-1]
    assert reason in loaded.stderr.splitlines()[-1]
    register = (
        "import onnxruntime\n"
        "options = onnxruntime.SessionOptions()\n"
        f"options.register_custom_ops_library({str(native.find_library())!r})"
    )
    registered = python(register, isa)
    assert registered.returncode == 1
    assert reason + " ".join(native.isa_names()) in registered.stderr.splitlines()[-1]


@compiled
def test_empty_variable_forces_nothing():
    done = python("from dijiang.runtime import operators as native; print(native.isa())", "")
    assert done.stdout.split() == native.isa_names()[:1]


def test_file_that_is_no_library_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "_native.so"
    path.write_bytes(b"not ELF")
    monkeypatch.setattr(native, "find_library", lambda: path)
    with pytest.raises(dijiang.SessionError, match="not the library of this dijiang"):
        native.operator_library()


@compiled
def test_graph_with_an_unknown_activation_is_refused():
    import onnx
    import onnxruntime

    from tests.native.steps import Case, node

    model = onnx.load_from_string(node(Case(7)))
    next(a for a in model.graph.node[0].attribute if a.name == "activation").i = 99
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(native.find_library()))
    with pytest.raises(Exception, match="unknown activation"):
        onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


@compiled
@pytest.mark.parametrize(
    "command",
    [
        ("run", "BUNDLE", "-p", "x"),
        ("verify", "BUNDLE", "--against", "CHECKPOINT"),
        ("export", "CHECKPOINT", "-o", "NEW"),
    ],
)
def test_no_command_takes_another_graph_in_its_place(exported, tmp_path, command):
    names = {"BUNDLE": exported("tiny-python"), "CHECKPOINT": EXAMPLES / "tiny-python", "NEW": tmp_path / "new"}
    command = [sys.executable, "-m", "dijiang", *(str(names.get(word, word)) for word in command)]
    done = subprocess.run(command, env={**os.environ, "DIJIANG_ISA": "AVX2"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "DIJIANG_ISA=AVX2 is no instruction set, expected one of: " in done.stderr


@compiled
def test_doctor_says_which_graphs_do_not_run_then():
    command = [sys.executable, "-m", "dijiang", "doctor"]
    done = subprocess.run(command, env={**os.environ, "DIJIANG_ISA": "AVX2"}, capture_output=True, text=True)
    assert "DIJIANG_ISA=AVX2 is no instruction set" in done.stdout
    assert "not here: native" in done.stdout
