"""Reports of the programs that have one, here and in tests: told, and kept where a file is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tell(report: Any, output: Path | None) -> None:
    """A report as JSON on stdout, and in a file."""
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="")
    if output is not None:
        output.write_text(text, encoding="utf-8")
