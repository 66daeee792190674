"""Everything that has to be measured on a GPU, in one call: parity, speed, bandwidth, peers.

    python benchmarks/gpu.py                             # all presets, fp16, int8 and int4, all cases
    python benchmarks/gpu.py --presets pythia-410m pythia-2.8b --precision fp16 --seconds 540
    python benchmarks/gpu.py --dry-run                   # a tiny model on the CPU: does the script work?

Each case runs in a process of its own: one that crashes, hangs or does not fit is a line of the report.
Results are written after every case and a later call goes on where one ended: a machine that is lent
for ten minutes at a time is enough. benchmarks/results/gpu-NAME.json keeps every raw sample.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import plan
from bundles import EXAMPLE, Place
from gpu_cases import CASES, Case, Run
from gpu_page import markdown

from dijiang.doctor.support import support
from dijiang.errors import DijiangError
from dijiang.machine.describe import describe_machine
from dijiang.machine.driver import Cuda
from dijiang.models.presets import PRESETS

#: Those of the asked numbers first; what does not fit is one line of the report.
SIZES = [
    *("pythia-410m", "pythia-2.8b", "pythia-70m", "pythia-160m", "pythia-1b"),
    *("opt-350m", "tinyllama-1.1b", "llama2-7b"),
]
#: Seconds that a case needs at least: none is started with less.
LEAST = 10.0


def main() -> int:
    options = read_options()
    if options.case:
        print(json.dumps(figures(options), default=lambda value: value.item()))
        return 0
    Path(options.out).mkdir(parents=True, exist_ok=True)
    dry = options.dry_run
    file = Path(options.out) / f"gpu-{options.name}{'-dry-run' * dry}.json"
    try:
        report = plan.kept(file, provider=options.provider) or {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": None if dry else asdict(Cuda().gpu),
            "machine": describe_machine(),
            "provider": options.provider,
            "dry_run": dry,
            "results": {},
        }
    except DijiangError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    measure(options, report, file)
    page = markdown(report)
    file.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def measure(options: argparse.Namespace, report: dict[str, Any], file: Path) -> None:
    """Every case that the report lacks, until the time is over; bundles go when they are through."""
    end, results = time.monotonic() + options.seconds, report["results"]
    for (preset, precision), rows in groupby(plan_of(options), lambda row: row[1:]):
        for case, *_ in rows:
            key = f"{case.name} {preset} {precision}"
            if key in results and not (options.retry and "error" in results[key]):
                continue
            left = end - time.monotonic()
            print(key, file=sys.stderr, flush=True)
            found = child(key, min(options.case_seconds, left)) if left > LEAST else None
            if found is None and left > options.case_seconds:
                found = {"error": f"did not end within {options.case_seconds:.0f} s"}
            if found is None:
                print(f"{options.seconds:.0f} s are over; call again to go on", file=sys.stderr)
                return
            results[key] = found
            plan.keep(report, file)
        if preset != EXAMPLE.name:
            shutil.rmtree(_place(options, preset, precision).folder, ignore_errors=True)


def child(key: str, seconds: float) -> dict[str, Any] | None:
    """The figures of one case, which its own process prints last; None if it did not end in time."""
    ended = plan.run([sys.executable, __file__, *sys.argv[1:], "--case", key], seconds)
    if ended is None:
        return None
    try:
        found: dict[str, Any] = json.loads(ended.output.splitlines()[-1])
    except (IndexError, ValueError):
        said = (ended.errors.strip().splitlines() or ["without a word"])[-1]
        found = {"error": f"the process ended with status {ended.status}: {said[:400]}"}
    if "error" in found:
        print("\n".join(ended.errors.splitlines()[-40:]), file=sys.stderr)
    return found | {"seconds_spent": round(ended.seconds, 1)}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    precisions = ("fp16", "bf16", "fp32", "int8", "int4")
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=SIZES)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--precision", nargs="+", choices=precisions)
    parser.add_argument("--provider", default="cuda", help="as dijiang run --provider takes it")
    parser.add_argument("--cache", default="/tmp/dijiang-gpu", help="checkpoints and bundles: gigabytes")
    parser.add_argument("--out", default=str(plan.RESULTS))
    parser.add_argument("--name", default=datetime.now(timezone.utc).strftime("%Y-%m-%d"))
    parser.add_argument("--seconds", type=float, default=1e9, help="end after this long; call again")
    parser.add_argument("--case-seconds", type=float, default=400, help="give a case up after this long")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU, 2 repeats")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # NAME PRESET PRECISION: the child's part
    options = parser.parse_args()
    if options.dry_run:
        options.presets, options.provider = ["tiny"], "cpu"
    # The CPU has no kernels of 16 bits, and a dry run is about the script.
    options.precision = options.precision or (["fp32", "int8"] if options.dry_run else ["fp16", "int8", "int4"])
    return options


def plan_of(options: argparse.Namespace) -> list[tuple[Case, str, str]]:
    """(case, preset, precision): those of the machine with EXAMPLE, then all of one size before the next."""
    wanted = [case for case in CASES if case.name in options.only]
    sizes = [(EXAMPLE.name, p) for p in options.precision]
    sizes += [(preset, p) for p in options.precision for preset in options.presets]
    return [
        (case, *size)
        for size in sizes
        for case in wanted
        if case.once == (size[0] == EXAMPLE.name) and case.covers(*size)
    ]


def _place(options: argparse.Namespace, preset: str, precision: str) -> Place:
    runs = (one.target for one in support() if (one.provider, one.precision) == (options.provider, precision))
    target = "tensorrt" if Place(Path(), preset, precision, options.provider).engine else next(runs, None) or "cuda"
    return Place(Path(options.cache), preset, precision, options.provider, (("target", target),))


def figures(options: argparse.Namespace) -> dict[str, Any]:
    """The case's figures, or why there are none."""
    name, preset, precision = options.case.split()
    case = next(case for case in CASES if case.name == name)
    try:
        return case.run(Run(_place(options, preset, precision), options.dry_run))
    except Exception as error:  # whatever a peer or a library raises: the next case may work
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


if __name__ == "__main__":
    sys.exit(main())
