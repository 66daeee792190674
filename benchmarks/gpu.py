"""Everything that has to be measured on a GPU, in one call: parity, speed, bandwidth, peers.

    python benchmarks/gpu.py                             # all presets, fp16, int8 and int4, all cases
    python benchmarks/gpu.py --presets pythia-410m --precision fp16 --only decode --seconds 500
    python benchmarks/gpu.py --dry-run                   # a tiny model on the CPU: does the script work?

Results are written after every case and a later call goes on where one ended: a machine that is lent
for ten minutes at a time is enough. benchmarks/results/gpu-NAME.json keeps every raw sample.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_cases import CASES, PEERS, Case, Place
from gpu_report import markdown

from dijiang.errors import DijiangError
from dijiang.models.presets import PRESETS
from dijiang.runtime.bench.machine import describe_machine
from dijiang.runtime.driver import Cuda

HERE = Path(__file__).parent
#: Small ones first; what does not fit is one line of the report.
SIZES = (
    "pythia-70m",
    "pythia-160m",
    "pythia-410m",
    "pythia-1b",
    "pythia-2.8b",
    "opt-350m",
    "tinyllama-1.1b",
    "llama2-7b",
)


def main() -> int:
    options = _options()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"gpu-{options.name}.json"
    report = json.loads(file.read_text()) if file.is_file() else _header(options)
    started = time.monotonic()
    for case, preset, precision in _plan(options):
        key = f"{case.name} {preset} {precision}"
        if key in report["results"]:
            continue
        if time.monotonic() - started > options.seconds:
            print(f"{options.seconds} s are over; call again to go on", file=sys.stderr)
            break
        print(key, file=sys.stderr, flush=True)
        report["results"][key] = _measure(case, options, preset, precision)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = markdown(report)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in (*CASES, *PEERS)]
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=list(SIZES))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp16", "bf16", "fp32", "int8", "int4"),
        default=["fp16", "int8", "int4"],
    )
    parser.add_argument("--provider", default="cuda", help="as dijiang run --provider takes it")
    parser.add_argument("--cache", default="/tmp/dijiang-gpu", help="checkpoints and bundles: gigabytes")
    parser.add_argument("--out", default=str(HERE / "results"))
    parser.add_argument("--name", default=datetime.now(timezone.utc).strftime("%Y-%m-%d"))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after this long")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU, 2 repeats")
    options = parser.parse_args()
    if options.dry_run:
        options.presets, options.provider = ["tiny"], "cpu"
        # The CPU has no bfloat16 kernels, and a dry run is about the script.
        options.precision = ["fp32", "int8"]
    return options


def _plan(options: argparse.Namespace) -> list[tuple[Case, str, str]]:
    """(case, preset, precision): those of the machine, then all of one size before the next."""
    wanted = [case for case in (*CASES, *PEERS) if case.name in options.only]
    once = [(case, "-", p) for case in wanted if case.once for p in options.precision]
    each = [
        (case, preset, p)
        for preset in options.presets
        for p in options.precision
        for case in wanted
        if not case.once
    ]
    return [row for row in (*once, *each) if row[0].covers(*row[1:])]


def _measure(case: Case, options: argparse.Namespace, preset: str, precision: str) -> dict[str, Any]:
    """The case's figures, or why there are none."""
    place = Place(Path(options.cache), preset, precision, options.provider, dry_run=options.dry_run)
    started = time.perf_counter()
    try:
        found = case.run(place)
    except (DijiangError, ImportError, RuntimeError, MemoryError, OSError) as error:
        # A size that does not fit, or a peer that is not installed, must not end the run.
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return found | {"seconds_spent": round(time.perf_counter() - started, 1)}


def _header(options: argparse.Namespace) -> dict[str, Any]:
    gpu = None if options.dry_run else asdict(Cuda().gpu)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "machine": describe_machine(),
        "provider": options.provider,
        "dry_run": options.dry_run,
        "results": {},
    }


if __name__ == "__main__":
    sys.exit(main())
