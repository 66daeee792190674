"""Without another project's package: one line with the pip command."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from dijiang.cli import main


@pytest.mark.parametrize(("module", "package"), [("transformers", "transformers"), ("lm_eval", "lm_eval")])
def test_an_integration_says_what_to_install(module, package):
    code = f"import sys; sys.modules[{package!r}] = None; import dijiang.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    extra = {"transformers": "transformers", "lm_eval": "eval"}[module]
    assert done.returncode == 1
    assert f"; pip install 'dijiang[{extra}]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["eval", "BUNDLE", "--tasks", "x"], "lm_eval", "eval"),
        (["deploy", "genai", "BUNDLE", "-o", "new"], "onnx", "export"),
        (["deploy", "triton", "BUNDLE", "-o", "new"], "onnx", "export"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_verb_says_what_to_install(monkeypatch, exported, tmp_path, arguments, package, extra):
    for name in [name for name in sys.modules if name.startswith("dijiang.integrations.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    bundle = str(exported("neox-base"))
    done = CliRunner().invoke(main, [bundle if one == "BUNDLE" else one for one in arguments])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.endswith(f"; pip install 'dijiang[{extra}]'\n")
    assert not list(tmp_path.iterdir())
