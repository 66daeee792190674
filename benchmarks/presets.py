"""Every published shape the whole way, from init to the paper's ratios: docs/models.md.

    python benchmarks/presets.py --folder /tmp/presets [--preset llama2-7b] [--precision int4]
                                 [--only export --only verify --keep]

Weights are random: they have a trained model's size and speed, not its text. Each step is a process of
its own whose memory is watched. Results are added to a JSON file, one row for a shape and a precision,
and within a row step by step: a run can be cut into pieces. The table is written from all rows
that were verified and ran.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import plan

from dijiang.bench import render
from dijiang.bundle.integrity import record_file
from dijiang.models.presets import PRESETS, size

RESULTS = plan.RESULTS / "presets.json"
TEMPLATE = plan.HERE / "models.template.md"
TABLE = plan.HERE.parent / "docs" / "models.md"
PLAN = json.loads(plan.HERE.joinpath("presets.json").read_text(encoding="utf-8"))
#: Precision -> the most parameters it is measured for.
PRECISIONS: dict[str, float] = PLAN["precisions"]
#: What each step runs; words in capitals are those of `measure`.
STEPS: dict[str, str] = PLAN["steps"]
#: The paper's table 1: times the Transformer's tokens a second, A800, length 2,048. Ours in int8 stands beside it.
PAPER: dict[str, float] = PLAN["paper"]


def copied(checkpoint: Path, folder: Path) -> float:
    """Seconds to copy and hash the files of a checkpoint: what an export is held to."""
    copy, started = folder / f"{checkpoint.name}.copy", time.perf_counter()
    for file in checkpoint.iterdir():
        shutil.copyfile(file, copy)
        record_file(copy)
    seconds = time.perf_counter() - started
    copy.unlink()
    return seconds


def watched(command: list[Any]) -> plan.Ended:
    """What a command did; ends the plan if it failed."""
    ended = plan.run(command, show=True)
    if ended is None or ended.status:
        raise SystemExit(f"{' '.join(map(str, command[:4]))} ... failed with {ended and ended.status}")
    return ended


def measure(row: dict[str, Any], folder: Path, dtype: str, only: list[str]) -> None:
    """Some steps of one shape and precision, added to its row."""
    preset, precision = row["preset"], row["precision"]
    checkpoint, bundle = folder / preset, folder / f"{preset}-{precision}"
    words = {
        "CHECKPOINT": checkpoint,
        "BUNDLE": bundle,
        "PRECISION": precision,
        "GENERATE": "\n".join(PLAN["generate"]),
    }
    words |= {"PYTHON": sys.executable, "DIJIANG": Path(sys.executable).with_name("dijiang")}
    if not checkpoint.is_dir():
        watched([words["DIJIANG"], "init", preset, "-o", checkpoint, "--dtype", dtype])
    row["source_bytes"] = sum(file.stat().st_size for file in checkpoint.iterdir())
    row["parameters"], row["state_bytes"] = size(preset).parameters, size(preset).state_bytes
    for name, command in STEPS.items():
        if name not in only or (name == "ratio" and (preset not in PAPER or precision != "int8")):
            continue
        print(f"{preset} {precision}: {name}", file=sys.stderr)
        if name == "export":
            shutil.rmtree(bundle, ignore_errors=True)
            row["copy_seconds"] = copied(checkpoint, folder)
        ended = watched([words.get(word, word) for word in command.split()])
        row[name] = ended.figures
        if name in READ:
            READ[name](row, json.loads(ended.output))


def _read_verify(row: dict[str, Any], report: dict[str, Any]) -> None:
    row["verify"] |= {key: report[key] for key in ("tokens", "passed", "text", "learned", "worst_layer")}
    row["verify"] |= report["logits"]


def _read_bench(row: dict[str, Any], report: dict[str, Any]) -> None:
    row["tokens_per_second"] = report["results"][0]["tokens_per_second"]
    row["machine"] = machine_line(report["environment"])


def _read_ratio(row: dict[str, Any], report: dict[str, Any]) -> None:
    rates = {(r["model"], r["batch"]): r["tokens_per_second"] for r in report["results"]}
    row["ratios"] = [
        {key: r[key] for key in ("batch", "measured", "low", "high", "predicted")}
        | {side: rates[r[side], r["batch"]] for side in ("model", "baseline")}
        for r in report["ratios"]
    ]


#: Step -> what its report adds to a row.
READ = {
    "export": lambda row, report: row.update(bytes=report["bytes"]),
    "verify": _read_verify,
    "bench": _read_bench,
    "ratio": _read_ratio,
}


def machine_line(environment: dict[str, Any]) -> str:
    """The machine and its software, in one sentence."""
    packages = ", ".join(f"{name} {v}" for name, v in environment["packages"].items())
    cores, memory = environment["cpu"]["physical_cores"], environment["memory"]["total_bytes"] / 1e9
    machine = f"Machine: {environment['cpu']['model']}, {cores} cores, {memory:.0f} GB"
    return f"{machine}; Python {environment['python']}; {packages}."


def table(results: dict[str, Any]) -> str:
    """docs/models.md from the rows of all verified bundles that ran, in the order of PRESETS."""
    order = {name: index for index, name in enumerate(PRESETS)}
    rows = [row for row in results["rows"] if row.keys() >= {"export", "verify", "run"}]
    rows = sorted(rows, key=lambda r: (order[r["preset"]], list(PRECISIONS).index(r["precision"])))
    pairs = [row | pair | {"paper": PAPER[row["preset"]]} for row in rows for pair in row.get("ratios", [])]
    copied = [{"copied": r["export"]["seconds"] / r["copy_seconds"]} if "copy_seconds" in r else {} for r in rows]
    rows = [row | more for row, more in zip(rows, copied, strict=True)]
    about = {name: results.get(name, "") for name in ("machine", "note", "dtype")}
    tables = {"shapes": _table(PLAN["shapes"], rows), "ratios": _table(PLAN["ratios"], pairs)}
    return TEMPLATE.read_text(encoding="utf-8").format(**about, **tables)


def _table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    shown = [{name: _shown(text, _mega(row)) for name, text in columns.items()} for row in rows]
    return render.table(shown) if shown else "Not measured yet."


def _shown(text: str, row: dict[str, Any]) -> str:
    """A figure of a row, or a dash where it was not measured."""
    try:
        return text.format(**row)
    except KeyError:
        return "-"


def _mega(row: dict[str, Any]) -> dict[str, Any]:
    """Bytes and parameters in millions."""
    found = {key: _mega(value) if isinstance(value, dict) else value for key, value in row.items()}
    return found | {key: row[key] / 1e6 for key in row if key.endswith("bytes") or key == "parameters"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="For checkpoints and bundles.")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="Default: all.")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="Default: all.")
    parser.add_argument("--dtype", default="float16", help="Of the checkpoints.")
    parser.add_argument("--keep", action="store_true", help="Keep checkpoints and bundles.")
    parser.add_argument("--only", choices=STEPS, action="append", help="Steps; default: all.")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    results = plan.kept(RESULTS) or {"rows": []}
    rows = {(row["preset"], row["precision"]): row for row in results["rows"]}
    for preset in options.preset or PRESETS:
        for precision in options.precision or PRECISIONS:
            if size(preset).parameters > PRECISIONS[precision]:
                continue
            row = rows.setdefault((preset, precision), {"preset": preset, "precision": precision})
            measure(row, options.folder, options.dtype, options.only or list(STEPS))
            results["machine"] = row.pop("machine", results.get("machine"))
            results |= {"dtype": options.dtype, "rows": list(rows.values())}
            plan.keep(results, RESULTS)
            TABLE.write_text(table(results), encoding="utf-8")
            if not options.keep:
                shutil.rmtree(options.folder / f"{preset}-{precision}")
        if not options.keep:
            shutil.rmtree(options.folder / preset)


if __name__ == "__main__":
    main()
