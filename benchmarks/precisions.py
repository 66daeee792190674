"""What each precision for GPUs costs the shipped example, computed on the CPU as a GPU would.

    python benchmarks/precisions.py -o REPORT.json

Every bundle is exported and verified on the held-out text, against float64. docs/gpu.md shows them.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from reports import tell

import dijiang
from dijiang.machine.describe import describe_machine

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-python"
TOKENS = 4096
PRECISIONS, TARGETS = ("fp16", "bf16", "int8", "int4"), ("cuda", "tensorrt")


def measure(precision: str, target: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each graph of a bundle."""
    bundle = dijiang.export(EXAMPLE, folder / "bundle", precision=precision, target=target, verify=False).path
    found = dijiang.verify(bundle, EXAMPLE, text=EXAMPLE / "held_out.txt", tokens=TOKENS)
    names = {"precision": precision, "target": target}
    return [names | {"graph": one.graph, "passed": one.passed} | asdict(one.logits) for one in found.each]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    rows = []
    for precision, target in product(PRECISIONS, TARGETS):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(precision, target, Path(folder))
    machine = describe_machine()
    report = {"dijiang": dijiang.__version__, "cpu": machine["cpu"]["model"], "tokens": TOKENS, "rows": rows}
    tell(report, given.output)


if __name__ == "__main__":
    main()
