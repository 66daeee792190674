"""The package as it is imported and documented."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dijiang

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "safetensors",
    "scipy",
    "tokenizers",
    "rich",
    "click",
    "jinja2",
    "starlette",
    "uvicorn",
    "prompt_toolkit",
)


def test_lock_of_the_container_has_a_hash_of_every_package_that_is_asked_for():
    tomllib = pytest.importorskip("tomllib")  # not in Python 3.10
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(one) for one in [*project["dependencies"], *extras["cpu"], *extras["serve"]]]
    lock = (ROOT / "deploy" / "container" / "runtime.lock").read_text()
    locked = dict(re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE))
    assert len(locked) == len(re.findall(r"^\S+==", lock, re.MULTILINE))
    for one in asked:
        if one.marker is None or one.marker.evaluate({"python_version": "3.12"}):
            assert one.specifier.contains(locked[canonicalize_name(one.name)]), f"{one}: run make lock"


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_import_loads_no_backend_and_no_exporter():
    assert run_python(f"import sys, dijiang; print(*[m for m in {HEAVY} if m in sys.modules])") == []
    assert run_python("import sys, dijiang.cli; print(*[m for m in ('numpy', 'onnx') if m in sys.modules])") == []


def test_runtime_needs_neither_torch_nor_the_exporter(exported):
    code = (
        "import sys, dijiang\n"
        f"model = dijiang.load({str(exported('tiny-python'))!r})\n"
        "next(model.generate('x', max_tokens=1))\n"
        "banned = ('torch', 'onnx', 'onnx_ir', 'safetensors', 'scipy', 'jinja2', 'starlette', 'dijiang.exporter')\n"
        "print(*[m for m in banned if m in sys.modules])\n"
    )
    assert run_python(code) == []


def test_export_and_verify_need_no_torch(tmp_path):
    from tests.conftest import EXAMPLES

    tiny = str(EXAMPLES / "tiny-python")
    code = (
        "import sys, dijiang\n"
        f"dijiang.export({tiny!r}, {str(tmp_path / 'b')!r})\n"
        f"dijiang.verify({str(tmp_path / 'b')!r}, {tiny!r}, tokens=8).require()\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_python(code) == ["False"]


def test_import_takes_less_than_0_3_seconds():
    code = "import time; t = time.perf_counter(); import dijiang; print(time.perf_counter() - t)"
    assert min(float(run_python(code)[0]) for _ in range(3)) < 0.3


def test_public_names_are_these():
    assert sorted(dijiang.__all__) == [
        "BenchError",
        "Bundle",
        "BundleError",
        "CheckpointError",
        "DecayError",
        "DijiangError",
        "EvalError",
        "ExportError",
        "HubError",
        "InputError",
        "Model",
        "ModelSpec",
        "ParityError",
        "Record",
        "SessionError",
        "State",
        "VersionError",
        "build",
        "export",
        "folder_of",
        "load",
        "verify",
    ]


@pytest.mark.parametrize("name", dijiang.__all__)
def test_public_name_exists_and_is_documented(name):
    assert getattr(dijiang, name).__doc__.strip()
    assert name in dir(dijiang)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dijiang.nothing


def test_every_error_is_in_the_tree_of_the_error_page():
    errors = import_module("dijiang.errors")
    classes = [v for v in vars(errors).values() if isinstance(v, type)]
    assert all(issubclass(c, dijiang.DijiangError) for c in classes)
    assert all(c.__name__ in errors.__doc__ for c in classes)
