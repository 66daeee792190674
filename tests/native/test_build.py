"""The wheel, with and without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from dijiang.runtime import operators as native
from dijiang.version import UNKNOWN

ROOT = Path(__file__).parents[2]
LIBRARY = f"dijiang/runtime/{native.FILE}"

cmake = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "c++", "ninja"))), reason="no cmake, ninja or C++ compiler"
)


def build(folder, hook, **environment):
    """What the build backend makes of a copy of the sources, which has no git."""
    for name in ("dijiang", "native", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    subprocess.run(
        [sys.executable, "-c", f"from scikit_build_core import build; build.{hook}('.')"],
        cwd=folder,
        env={**os.environ, **environment},
        check=True,
    )
    return next(path for path in folder.iterdir() if path.name.startswith(f"dijiang-{UNKNOWN}"))


@pytest.mark.samples
@cmake
def test_wheel_is_bound_to_a_platform_and_to_no_python(tmp_path):
    wheel = build(tmp_path, "build_wheel")
    assert wheel.name.startswith(f"dijiang-{UNKNOWN}-py3-none-")
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as files:
        assert [name for name in files.namelist() if "_native" in name] == [LIBRARY]
        library = files.read(LIBRARY)
        assert "dijiang/integrations/tasks/dijiang_paper.yaml" in files.namelist()
        assert files.read("dijiang/_version.py").decode() == f'__version__ = "{UNKNOWN}"'
    assert_no_python(library)


def assert_no_python(library):
    """One library serves every Python."""
    assert b"PyInit" not in library
    assert b"libpython" not in library


@cmake
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_failing_compiler_costs_the_native_graph_only(tmp_path, hook):
    failing = shutil.which("false")
    wheel = build(tmp_path, hook, CC=failing, CXX=failing)
    assert wheel.name == f"dijiang-{UNKNOWN}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as files:
        assert LIBRARY not in files.namelist()


def test_source_distribution_has_the_native_sources(tmp_path):
    with tarfile.open(build(tmp_path, "build_sdist")) as archive:
        names = archive.getnames()
    inside = {name.split("/", 1)[-1] for name in names}
    native_files = [path for path in (ROOT / "native").rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in native_files} <= inside
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in inside)


@pytest.mark.skipif(native.find_library() is None, reason="no compiled operator")
def test_installed_wheel_names_no_python():
    text = distribution("dijiang").read_text("WHEEL")
    tags = [line for line in text.splitlines() if line.startswith("Tag: ")]
    assert tags
    assert all(tag.startswith("Tag: py3-none-") and not tag.endswith("any") for tag in tags)
    assert_no_python(Path(native.find_library()).read_bytes())
