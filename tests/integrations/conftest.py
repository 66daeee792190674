"""Pages are run: every command block, in a folder where BUNDLE and CHECKPOINT are the shipped example."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES

PAGES = EXAMPLES.parent / "docs" / "integrations"
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
#: What a page says about installation is done by `make ecosystem`.
INSTALLS = re.compile(r"^pip install .*\n", re.MULTILINE)


@pytest.fixture
def page(exported, tmp_path):
    """page(name): run the blocks of docs/integrations/NAME.md in turn; what they printed."""

    def run(name: str) -> str:
        (tmp_path / "BUNDLE").symlink_to(exported("tiny-python"))
        (tmp_path / "CHECKPOINT").symlink_to(EXAMPLES / "tiny-python")
        programs = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
        blocks = BLOCK.findall((PAGES / f"{name}.md").read_text(encoding="utf-8"))
        assert blocks
        printed = []
        for language, code in blocks:
            command = [*programs[language], INSTALLS.sub("", code)]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
        return "".join(printed)

    return run
