"""dijiang verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bundle.opened import open_bundle
from ..errors import BundleError, InputError
from ..files import check_file
from ..hub import repository_of
from . import (
    FILE,
    JSON,
    PROGRESS,
    SIGNERS,
    TEXT,
    ModelFolder,
    graph_option,
    model_folder,
    print_json,
    print_table,
    threads_option,
)
from .inspect import NOT_JUDGED, VERDICTS, calibrated_on

if TYPE_CHECKING:
    from ..parity.difference import Difference
    from ..parity.findings import Parity


@click.command()
@model_folder("bundle")
@click.option("--against", type=ModelFolder(), required=True, help="Its checkpoint.")
@TEXT
@click.option("--tokens", type=click.IntRange(2), help="At most; default: what suits the model's size.")
@click.option(
    "--store/--no-store", default=True, show_default=True, help="Keep the report in BUNDLE, unless it is the Hub's."
)
@click.option(
    "--provider", default="cpu", show_default=True, help="What runs BUNDLE; the CPU rounds as a GPU would."
)
@click.option("--html", type=FILE, help="Write a page: errors by layer, position and token; decay.")
@graph_option("Only this one of the bundle's graphs.")
@SIGNERS
@PROGRESS
@threads_option("Default: all cores it may use.")
@JSON
def verify(
    bundle: Path,
    against: Path,
    store: bool,
    html: Path | None,
    require_signature: Path | None,
    as_json: bool,
    progress: bool | None,
    **options: Any,
) -> None:
    """Compare BUNDLE with its checkpoint in float64; exit 1 if a gate fails."""
    from ..parity.page import write_page
    from ..parity.verify import compare_bundle, store_report
    from ..progress import bars

    if html is not None:
        check_file(html, InputError)
    opened = open_bundle(bundle, require_signature=require_signature)
    with bars(progress) as shown:
        report = compare_bundle(opened, against, progress=shown, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        where = f"at positions 0 to {report.positions - 1}, {report.reference_dtype} reference"
        rows = [("tokens", f"{report.tokens} ({report.text}) {where}")]
        if report.calibrated_on:
            rows.append(("warning", f"{calibrated_on(report.calibrated_on)}; give another text"))
        for one in report.each:
            rows += _graph_rows(one)
        if report.decay_change is not None:
            rows.append(("", "analytic decay against the trained tables:"))
            rows += _difference_rows(report.decay_change)
        if not report.same_source:
            warning = "the bundle was exported from other files than this checkpoint's; nothing is stored"
            rows.append(("warning", warning))
        rows.append(("result", (VERDICTS | {None: NOT_JUDGED})[report.passed]))
        print_table(rows)
    if html is not None:
        write_page(html, report, opened)
    if store and repository_of(bundle.resolve()) is None:
        try:
            store_report(opened, report)
        except BundleError as error:
            report.require()  # a failed gate matters more
            raise BundleError(f"{error}, or verify with --no-store") from error
    report.require()


def _graph_rows(report: Parity) -> list[tuple[str, str]]:
    rows = [("", f"graph {report.graph}:"), *_difference_rows(report.logits)]
    twin = report.rounded
    rows.append(("plain rounding itself", f"{twin.rms_relative_error:.2e} RMS-relative, KL {twin.kl:.2e} nats"))
    rows.append((f"one at a time, first {report.steps}", f"{report.step_error:.2e} max"))
    if report.padded_error is not None:
        rows.append(("two in a padded batch", f"{report.padded_error:.2e} max"))
    if report.far_error is not None:
        rows.append((f"from position {report.far_position:,} on", f"{report.far_error:.2e} RMS-relative"))
    rows += [
        (f"state after {e.length}", f"{e.rms_relative_error:.2e} RMS-relative, layer {e.layer}")
        for e in report.state_errors
    ]
    rows += [
        (f"gate {v.metric}", f"{v.found:.2e} of {v.bound:.1e}{'' if v.passed else ' FAILED'}") for v in report.gates
    ]
    return rows


def _difference_rows(difference: Difference) -> list[tuple[str, str]]:
    d = difference
    rows = [
        ("logits, max error", f"{d.max_error:.2e}"),
        ("logits, RMS-relative error", f"{d.rms_relative_error:.2e}"),
        ("KL divergence", f"{d.kl:.2e} nats"),
        ("top-1 agreement", f"{d.top1_agreement:.3%}"),
    ]
    if d.perplexity_change is not None:
        rows.append(
            ("perplexity", f"{d.reference_perplexity:.4f} -> {d.perplexity:.4f} ({d.perplexity_change:+.4%})")
        )
    return rows
