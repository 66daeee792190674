"""The tables of benchmarks/gpu.py, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

#: Columns of the decode table after our own.
PEERS = ("hf-eager", "hf-static", "hf-graph", "hf-compile", "torch-dijiang")


def markdown(report: dict[str, Any]) -> str:
    """The report as a page; a figure that is missing is a dash, with its reason below."""
    gpu = report["gpu"]
    where = "no GPU: a dry run of the script" if gpu is None else f"{gpu['name']} ({gpu['sm']})"
    packages = report["machine"].get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines = [f"# {where}", "", f"{report['date']}, provider {report['provider']}. {versions}", ""]
    results = report["results"]
    rate = max((f["bytes_per_second"] for *_, f in _of(results, "bandwidth")), default=None)
    if rate:
        lines += [f"Measured memory bandwidth: {rate / 1e9:,.0f} GB/s.", ""]
    lines += [
        *_asked(results, rate),
        "",
        *_decode(results, rate),
        "",
        *_parity(results),
        "",
        *_prefill(results),
        "",
        *_failed(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _asked(results: dict[str, Any], bandwidth: float | None) -> Iterator[str]:
    """The numbers of the issue beside what was found."""
    rows: list[tuple[str, float, float, float | None]] = [
        ("fp16 2.8B decode, share of bandwidth", 0.60, 0.80, _share(results, "pythia-2.8b", bandwidth)),
        ("fp16 410M decode over hf-graph at 2,048", 1.5, 3.0, _over(results, "hf-graph", "pythia-410m")),
        ("fp16 410M decode over hf-eager at 2,048", 3.9, 7.8, _over(results, "hf-eager", "pythia-410m")),
        (
            "fp16 2.8B decode over hf-eager at 2,048",
            8.4,
            16.8,
            _over(results, "hf-eager", "pythia-2.8b"),
        ),
        ("fp16 top-1 agreement on tiny-python", 0.99, 1.0, _top1(results)),
    ]
    yield "| asked | must | stretch | found | |"
    yield "|---|---|---|---|---|"
    for name, must, stretch, found in rows:
        verdict = "stretch" if (found or 0) >= stretch else "reached" if (found or 0) >= must else "missed"
        shown = "- | not measured" if found is None else f"{found:.3f} | {verdict}"
        yield f"| {name} | {must} | {stretch} | {shown} |"
    for preset, precision, found in _of(results, "decode"):
        deep = _deep(found)
        if deep is not None:
            verdict = "reached" if abs(deep - 1) <= 0.02 else "missed"
            name = f"{preset} {precision}, time at 100,000 over 0"
            yield f"| {name} | 1 +- 0.02 | | {deep:.3f} | {verdict} |"


def _deep(decode: dict[str, Any]) -> float | None:
    """None: the model has no such position."""
    base, deep = (decode["depths"].get(f"graph @ d{depth}") for depth in (0, 100_000))
    return float(np.median(deep) / np.median(base)) if deep and base else None


def _share(results: dict[str, Any], preset: str, bandwidth: float | None) -> float | None:
    found = results.get(f"decode {preset} fp16", {})
    if "depths" not in found or not bandwidth:
        return None
    return float(found["bytes_per_token"] / np.median(found["depths"]["graph @ d0"]) / bandwidth)


def _over(results: dict[str, Any], peer: str, preset: str) -> float | None:
    ours = results.get(f"decode {preset} fp16", {}).get("depths", {}).get("graph @ d2048")
    theirs = results.get(f"{peer} {preset} fp16", {}).get("lengths", {}).get("2048")
    return float(np.median(theirs) / np.median(ours)) if ours and theirs else None


def _top1(results: dict[str, Any]) -> float | None:
    logits = results.get("text-parity - fp16", {}).get("logits")
    return float(logits["top1_agreement"]) if logits else None


def _of(results: dict[str, Any], case: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(preset, precision, result) of a case that worked."""
    for key, found in results.items():
        name, preset, precision = key.split()
        if name == case and "error" not in found:
            yield preset, precision, found


def _rate(samples: list[float] | None) -> str:
    return "-" if not samples else f"{1 / float(np.median(samples)):,.1f}"


def _decode(results: dict[str, Any], bandwidth: float | None) -> Iterator[str]:
    yield "Decode, batch 1, tokens/s (median); share: bytes a token over measured bandwidth"
    yield ""
    yield "| model | graph | plain | share | d100000 / d0 | " + " | ".join(PEERS) + " |"
    yield "|---" * (5 + len(PEERS)) + "|"
    for preset, precision, found in _of(results, "decode"):
        depths = found["depths"]
        base = float(np.median(depths["graph @ d0"]))
        deep = _deep(found)
        share = found["bytes_per_token"] / base / bandwidth if bandwidth else None
        peers = []
        for name in PEERS:
            lengths = results.get(f"{name} {preset} {precision}", {}).get("lengths", {})
            peers.append(_rate(lengths.get("2048", next(iter(lengths.values()), None))))
        yield (
            f"| {preset} {precision} | {_rate(depths['graph @ d0'])} | {_rate(depths['plain @ d0'])} | "
            f"{'-' if share is None else f'{share:.0%}'} | {'-' if deep is None else f'{deep:.3f}'} | "
            f"{' | '.join(peers)} |"
        )


def _parity(results: dict[str, Any]) -> Iterator[str]:
    yield "Parity with float64"
    yield ""
    yield "| model | max error | RMS-relative | KL | top-1 | step against prefill | graphs differ |"
    yield "|---|---|---|---|---|---|---|"
    for case in ("text-parity", "parity"):
        for preset, precision, found in _of(results, case):
            logits = found["logits"]
            graphs = results.get(f"graphs {preset} {precision}", {})
            name = "tiny-python on text" if case == "text-parity" else preset
            yield (
                f"| {name} {precision} | {logits['max_error']:.2e} | "
                f"{logits['rms_relative_error']:.2e} | "
                f"{logits['kl']:.1e} | {logits['top1_agreement']:.2%} | {found['step_error']:.1e} | "
                f"{graphs.get('different', '-')} of {graphs.get('compared', '-')} |"
            )


def _prefill(results: dict[str, Any]) -> Iterator[str]:
    yield "Prefill, tokens/s (median)"
    yield ""
    yield "| model | longest piece | figures |"
    yield "|---|---|---|"
    for preset, precision, found in _of(results, "prefill"):
        rates = ", ".join(
            f"{name} {int(name.partition('pp')[2]) / float(np.median(samples)):,.0f}"
            for name, samples in found["lengths"].items()
        )
        yield f"| {preset} {precision} | {found['longest_piece']} | {rates} |"


def _failed(results: dict[str, Any]) -> Iterator[str]:
    for key, found in results.items():
        reason = found.get("error") or found.get("skipped")
        if reason:
            yield f"- {key}: {reason}"
