"""The page of benchmarks/gpu.py, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from targets import Target, target_table

from dijiang.bench.matrix import Test, failure
from dijiang.bench.render import table, tables
from dijiang.bench.report import Report, target
from dijiang.bench.results import FLAT, roofline
from dijiang.bench.subject import Traffic

DEEP = 100_000
EXAMPLE = ("text-parity tiny-python fp16", "")
TOP1 = Target("parity", "fp16 top-1 agreement on tiny-python", "agreement", 0.99, EXAMPLE, stretch=1.0)
SMALL, LARGE = "pythia-410m fp16", "pythia-2.8b fp16"
#: What is asked of decoding beside a peer: label, peer, model, what must be reached, stretch.
BESIDE = (
    ("fp16 410M decode over hf-graph at 2,048", "hf-graph", SMALL, 1.5, 3.0),
    ("fp16 410M decode over hf-eager at 2,048", "hf-eager", SMALL, 3.9, 7.8),
    ("fp16 2.8B decode over hf-eager at 2,048", "hf-eager", LARGE, 8.4, 16.8),
)


def merged(results: dict[str, Any], bandwidth: float | None) -> Report:
    """All reports of a run as one: each case had a process of its own, so none took turns."""
    whole: Report = {name: [] for name in ("models", "results", "ratios", "flatness", "errors")}
    for key, found in results.items():
        if error := found.get("error"):
            whole["errors"].append(failure(error, key))
        if "schema_version" not in found:
            continue
        for name in ("models", "ratios", "flatness", "errors"):
            whole[name] += found[name]
        models = {model["name"]: Traffic(**model["traffic"]) for model in found["models"]}
        for result in found["results"]:
            traffic, test = models[result["model"]], Test.of(result)
            moved = {"run": key}
            if bandwidth and traffic.weights and not test.prompt:
                moved["roofline"] = roofline(traffic, test, target(result)["latency"]["p50"], bandwidth)
            whole["results"].append(result | moved)
    return whole


def _targets(report: Report) -> Iterator[Target]:
    """The numbers of the issue, for the tests that were run."""
    for n in sorted({r["tokens"] for r in report["results"] if r["kind"] == "tg"}):
        yield Target(
            "all", "fp16 2.8B decode, share of bandwidth", "roofline", 0.60, (LARGE, f"tg{n}"), stretch=0.80
        )
        for label, peer, model, must, stretch in BESIDE:
            theirs = (f"{peer} {model}", f"tg{n} @ d{2048 - n}")
            yield Target("all", label, "over", must, (model, f"tg{n} @ d2048"), theirs, stretch)
        for model in (f["model"] for f in report["flatness"] if DEEP in f["depths"]):
            deep, first = (model, f"tg{n} @ d{DEEP}"), (model, f"tg{n}")
            yield Target("all", f"{model}, time at {DEEP:,} over 0", "flat", 1 + FLAT, deep, first)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page; what failed is said at the end."""
    gpu, results = report["gpu"], report["results"]
    where = "no GPU: a dry run of the script" if gpu is None else f"{gpu['name']} ({gpu['sm']})"
    packages = report["machine"].get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    rate = max((found["bytes_per_second"] for *_, found in _of(results, "bandwidth")), default=None)
    whole = merged(results, rate)
    parts = [f"# {where}", f"{report['date']}, provider {report['provider']}. {versions}"]
    parts += [f"Measured memory bandwidth: {rate / 1e9:,.0f} GB/s."] if rate else []
    parts += [target_table((*_targets(whole), TOP1), {"all": whole, "parity": results})]
    parts += [*tables(whole), *([table(rows)] if (rows := _parity(results)) else [])]
    return "\n\n".join(parts) + "\n"


def _of(results: dict[str, Any], case: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(preset, precision, result) of a case that worked."""
    for key, found in results.items():
        name, preset, precision = key.split()
        if name == case and "error" not in found:
            yield preset, precision, found


def _parity(results: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for case in ("text-parity", "parity"):
        for preset, precision, found in _of(results, case):
            logits, graphs = found["logits"], results.get(f"graphs {preset} {precision}", {})
            rows.append(
                {
                    "parity with float64": f"{preset} {precision}",
                    "max error": f"{logits['max_error']:.2e}",
                    "RMS-relative": f"{logits['rms_relative_error']:.2e}",
                    "KL": f"{logits['kl']:.1e}",
                    "top-1": f"{logits['top1_agreement']:.2%}",
                    "step against prefill": f"{found['step_error']:.1e}",
                    "graphs differ": f"{graphs.get('different', '-')} of {graphs.get('compared', '-')}",
                }
            )
    return rows
