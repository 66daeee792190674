"""What a stranger installs: the sdist, a wheel made from it, repaired, in an environment that has nothing else."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dijiang.cli import main
from tests.conftest import EXAMPLES

pytestmark = pytest.mark.ecosystem
ROOT = EXAMPLES.parent
#: Megabytes. NumPy and onnxruntime are what they are: they are not counted.
LARGEST_WHEEL, LARGEST_INSTALLATION = 1, 75
#: Seconds.
LONGEST_IMPORT = 0.15


def call(*command, **options):
    """Its standard output; the test fails where it fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | options.pop("env", {})
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    call(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """From the sdist, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-index", "--no-build-isolation", "--no-deps")
    call(sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", folder, sdist)
    call("auditwheel", "repair", "-w", folder / "repaired", next(folder.glob("*.whl")))
    return next((folder / "repaired").glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """An environment with the wheel and what it needs."""
    folder = tmp_path_factory.mktemp("clean")
    call(sys.executable, "-m", "venv", folder)
    call(folder / "bin" / "pip", "install", "-q", f"{wheel}[cpu]")
    return folder


def test_the_sdist_has_the_sources_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/")[1] for name in archive.getnames()}
    assert {"dijiang", "native", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not names & {"tests", "docs", "benchmarks", "examples", "packages", "deploy", ".ci"}


def test_the_wheel_is_for_any_python_on_any_linux_with_glibc(wheel):
    assert re.search(r"-py3-none-manylinux_2_\d+_x86_64\.whl$", wheel.name)
    assert wheel.stat().st_size <= LARGEST_WHEEL * 1e6
    with zipfile.ZipFile(wheel) as files:
        assert {"dijiang/runtime/_native.so", "dijiang/server/browser/page.js"} <= set(files.namelist())
        assert not [name for name in files.namelist() if ".libs/" in name]


def test_the_wheel_runs_in_a_clean_environment(clean, wheel, exported, tmp_path):
    bundle = exported("tiny-python", precision="int8")
    command = ("run", bundle, "-p", "def main(", "--max-tokens", "8", "--json")
    found, expected = (
        json.loads(call(program, *command, cwd=tmp_path))["text"]
        for program in (clean / "bin" / "dijiang", "dijiang")
    )
    assert found == expected
    assert call(clean / "bin" / "dijiang", "--version", cwd=tmp_path).split()[-1] == wheel.name.split("-")[1]
    assert "native graph" in call("bash", "-c", f"{clean}/bin/dijiang run {bundle} -p x -n 1 -v 2>&1", cwd=tmp_path)


def test_uv_keeps_it_as_a_tool(wheel, exported, tmp_path):
    places = {"UV_TOOL_DIR": tmp_path / "tools", "UV_TOOL_BIN_DIR": tmp_path / "bin"}
    python = ("--python", sys.executable, "--no-python-downloads")
    call("uv", "tool", "install", "-q", *python, f"{wheel}[cpu]", env={k: str(v) for k, v in places.items()})
    bundle = exported("tiny-python", precision="int8")
    found = call(tmp_path / "bin" / "dijiang", "run", bundle, "-p", "def main(", "-n", "8", "--json", cwd=tmp_path)
    assert json.loads(found)["generated"] == 8


def test_the_installation_is_small(clean):
    folder = next((clean / "lib").glob("python*")) / "site-packages"
    not_ours = ("numpy", "onnxruntime", "pip", "setuptools", "pkg_resources", "_distutils_hack")
    sizes = {
        one.name: sum(file.stat().st_size for file in [one, *one.rglob("*")] if file.is_file())
        for one in folder.iterdir()
        if not one.name.startswith(not_ours)
    }
    print(f"\n{sum(sizes.values()) / 1e6:.0f} MB beside NumPy and onnxruntime")
    assert sum(sizes.values()) <= LARGEST_INSTALLATION * 1e6


def test_the_import_is_fast(clean, tmp_path):
    """Seconds of the processor: what else the machine does is not counted."""
    code = "import time; t = time.process_time(); import dijiang, dijiang.cli; print(time.process_time() - t)"
    seconds = min(float(call(clean / "bin" / "python", "-c", code, cwd=tmp_path)) for _ in range(5))
    print(f"\n{seconds:.3f} s")
    assert seconds <= LONGEST_IMPORT


def test_cibuildwheel_reads_its_configuration():
    for platform, expected in (
        ("linux", {"manylinux_x86_64", "manylinux_aarch64", "musllinux_x86_64", "musllinux_aarch64"}),
        ("macos", {"macosx_x86_64", "macosx_arm64"}),
        ("windows", {"win_amd64"}),
    ):
        found = call("cibuildwheel", "--print-build-identifiers", "--platform", platform, ROOT).split()
        assert set(found) == {f"cp312-{name}" for name in expected}


def test_the_container_file_is_sound_and_copies_what_is_there():
    file = ROOT / "deploy" / "container" / "Containerfile"
    call("hadolint", "--failure-threshold", "info", file)
    sources = [line.split()[1:-1] for line in file.read_text().splitlines() if re.match(r"COPY (?!--)", line)]
    copied = {name for names in sources for name in names}
    ignored = (ROOT / ".containerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    import tomllib  # not in Python 3.10, which collects this file

    built = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(built["project"]["license-files"]) | {built["project"]["readme"]} <= copied


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_verbs_and_options(shell):
    given = {"_DIJIANG_COMPLETE": f"{shell}_complete"}
    verb = {"COMP_WORDS": "dijiang ver", "COMP_CWORD": "ver" if shell == "fish" else "1"}
    option = {"COMP_WORDS": "dijiang run --max-", "COMP_CWORD": "--max-" if shell == "fish" else "2"}
    assert "verify" in call("dijiang", env=given | verb)
    assert "--max-tokens" in call("dijiang", env=given | option)


def test_every_verb_has_a_man_page(tmp_path):
    call("click-man", "dijiang", "--target", tmp_path)
    pages = {page.stem for page in tmp_path.iterdir()}
    assert pages >= {"dijiang", "dijiang-deploy-genai", *(f"dijiang-{verb}" for verb in main.commands)}


def test_the_page_does_what_it_says(page):
    assert "DIJIANG" in page("../install")
