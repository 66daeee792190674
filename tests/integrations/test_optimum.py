"""`optimum-cli export dijiang`, with the real optimum and our distribution installed beside it."""

import json
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest

from tests.conftest import GOLDEN

pytestmark = pytest.mark.ecosystem
CLI = str(Path(sys.executable).parent / "optimum-cli")


def optimum(*arguments):
    return subprocess.run([CLI, *map(str, arguments)], capture_output=True, text=True)


def test_optimum_writes_the_bundle_that_dijiang_writes(exported, tmp_path):
    expected = exported("neox-base", precision="int8")
    options = ("--precision", "int8", "--calibration-tokens", "0", "--no-verify")
    done = optimum("export", "dijiang", GOLDEN["neox-base"], tmp_path / "made", *options)
    assert done.returncode == 0, done.stderr
    found, wanted = (json.loads((folder / "dijiang.json").read_text()) for folder in (tmp_path / "made", expected))
    assert found["files"] == wanted["files"]


def test_errors_are_those_of_dijiang(vanilla, tmp_path):
    done = optimum("export", "dijiang", vanilla, tmp_path / "made")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "made").exists()
    done = optimum("export", "dijiang", vanilla, tmp_path / "made", "--nonsense")
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_other_commands_of_optimum_are_untouched():
    assert "dijiang" in optimum("export", "--help").stdout
    assert optimum("env").returncode == 0


def test_what_every_start_of_optimum_reads_is_light():
    code = (
        "import sys, optimum.commands.optimum_cli; before = set(sys.modules)\n"
        "import optimum.commands.register.register_dijiang\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ("export.dijiang", "register", "register.register_dijiang")
    assert done.stdout.split() == [f"optimum.commands.{name}" for name in names]


def test_the_distribution_holds_two_files_in_the_namespace_of_optimum():
    code = [str(file) for file in files("optimum-dijiang") if file.suffix == ".py"]
    assert sorted(code) == ["optimum/commands/export/dijiang.py", "optimum/commands/register/register_dijiang.py"]
