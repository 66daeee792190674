"""The end of the programs that run for long: what they found, told and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tell(report: dict[str, Any], output: Path | None) -> None:
    """A report as JSON on stdout, and in a file where one is asked for."""
    text = json.dumps(report, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")
