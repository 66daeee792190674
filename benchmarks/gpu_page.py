"""The page of benchmarks/gpu.py, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from targets import Target, target_table

from dijiang.bench.matrix import Test
from dijiang.bench.render import table, tables
from dijiang.bench.report import Report, target
from dijiang.bench.results import roofline
from dijiang.bench.traffic import Traffic

DEEP, FLAT = 100_000, 0.02
EXAMPLE = ("text-parity tiny-python fp16", "")
TOP1 = Target("parity", "fp16 top-1 agreement on tiny-python", "agreement", 0.99, 1.0, EXAMPLE)


def merged(results: dict[str, Any], bandwidth: float | None) -> Report:
    """All reports of a run as one: each case had a process of its own, so none took turns."""
    parts: dict[str, list[Any]] = {
        "models": [],
        "results": [],
        "ratios": [],
        "flatness": [],
        "errors": [],
    }
    for key, found in results.items():
        if error := found.get("error"):
            parts["errors"].append({"model": key, "test": None, "message": error})
        for name, known in parts.items():
            known += found.get(name, []) if "schema_version" in found else []
        for result in found.get("results", []):
            model = next(m for m in found["models"] if m["name"] == result["model"])
            traffic, test = Traffic(**model["traffic"]), Test.of(result)
            result |= {"run": key}
            if bandwidth and traffic.weights and not test.prompt:
                seconds = target(result)["latency"]["p50"]
                result["roofline"] = roofline(traffic, test, seconds, bandwidth)
    return parts


def _targets(report: Report) -> Iterator[Target]:
    """The numbers of the issue, for the tests that were run."""
    steps = {r["tokens"] for r in report["results"] if r["kind"] == "tg"}
    for n in sorted(steps):
        deep, at = f"tg{n} @ d2048", f"tg{n} @ d{2048 - n}"
        small, large = "pythia-410m fp16", "pythia-2.8b fp16"
        share = "fp16 2.8B decode, share of bandwidth"
        yield Target("all", share, "roofline", 0.60, 0.80, (large, f"tg{n}"))
        for label, peer, model, must, stretch in (
            ("fp16 410M decode over hf-graph at 2,048", "hf-graph", small, 1.5, 3.0),
            ("fp16 410M decode over hf-eager at 2,048", "hf-eager", small, 3.9, 7.8),
            ("fp16 2.8B decode over hf-eager at 2,048", "hf-eager", large, 8.4, 16.8),
        ):
            yield Target("all", label, "over", must, stretch, (model, deep), (f"{peer} {model}", at))
        for model in (f["model"] for f in report["flatness"] if DEEP in f["depths"]):
            label, rows = f"{model}, time at {DEEP:,} over 0", (f"tg{n} @ d{DEEP}", f"tg{n}")
            yield Target("all", label, "flat", 1 + FLAT, None, (model, rows[0]), (model, rows[1]))


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
    targets = (*_targets(whole), TOP1)
    parts += [target_table(targets, {"all": whole, "parity": results})]
    parts += [*tables(whole), *_parity(results)]
    return "\n\n".join(parts) + "\n"


def _of(results: dict[str, Any], case: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(preset, precision, result) of a case that worked."""
    for key, found in results.items():
        name, preset, precision = key.split()
        if name == case and "error" not in found:
            yield preset, precision, found


def _parity(results: dict[str, Any]) -> Iterator[str]:
    rows = []
    for case in ("text-parity", "parity"):
        for preset, precision, found in _of(results, case):
            logits = found["logits"]
            graphs = results.get(f"graphs {preset} {precision}", {})
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
    if rows:
        yield table(rows)
