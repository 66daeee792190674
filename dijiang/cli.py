"""The command line: options in, reports out; all work is done elsewhere.

Results go to stdout, progress and errors to stderr. Exit status: 0 success, 1 a DijiangError (one
line), 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .commands import BUNDLE, JSON, PROGRESS, PROVIDER, THREADS, print_table
from .commands.bench import bench
from .commands.build import build
from .commands.bundle import show_bundle
from .commands.convert import convert
from .commands.doctor import doctor
from .commands.init import init
from .errors import DijiangError
from .version import __version__

if TYPE_CHECKING:
    from .parity.difference import Difference


class OneLineErrors(click.Group):
    """A group whose commands report a DijiangError as one line and exit with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DijiangError as error:
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            ctx.exit(1)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """DiJiang checkpoints to ONNX, and text from them with constant memory per token."""


TEXT = "Text to verify on, for perplexity; default: random token ids, or (int8, int4) text of its own."

for command in (bench, build, convert, doctor, init):
    main.add_command(command)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Bundle folder.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
    default="fp32",
    show_default=True,
)
@click.option(
    "--head-precision", type=click.Choice(["fp32", "int8", "int4"]), help="Default: 8 bits if quantized."
)
@click.option("--block-size", type=int, help="Input channels that share a scale; default: 128.")
@click.option(
    "--calibration-tokens",
    type=click.IntRange(0),
    help="Of the model's own text, to round to int4 by; 0: nearest values. Default: what pays.",
)
@click.option(
    "--dialect",
    type=click.Choice(["auto", "native", "ort", "onnx", "primitive"]),
    default="auto",
    show_default=True,
    help="native: fastest on the CPU, with an operator that dijiang compiles when it is installed; "
    "ort: onnxruntime 1.30 or newer; onnx: opset 27; primitive: TensorRT, old onnxruntime; "
    "auto: ort, or primitive if the installed onnxruntime is older.",
)
@click.option(
    "--target",
    type=click.Choice(["onnxruntime", "cuda", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="cuda: int8 and int4 with activations in fp16; tensorrt: the primitive dialect, for dijiang "
    "build.",
)
@click.option(
    "--decay",
    type=click.Choice(["exact", "analytic"]),
    default="exact",
    show_default=True,
    help="analytic drops trained D1/D2 tables, and with them the position limit.",
)
@click.option(
    "--repair-decay", is_flag=True, help="Key scale 1 where a trained D2 was lost to overflow."
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare with CHECKPOINT in float64, and keep the bundle only if it passes.",
)
@click.option("--text", type=click.Path(path_type=Path), help=TEXT)
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@PROGRESS
@THREADS
@JSON
def export(checkpoint: Path, output: Path, as_json: bool, progress: bool | None, **options: Any) -> None:
    """Write the recurrent-step graph of CHECKPOINT as a bundle."""
    from .exporter.export import export as write
    from .progress import bars

    with bars(progress) as report:
        bundle = write(checkpoint, output, progress=report, **options)
    show_bundle(bundle, as_json)


@main.command()
@BUNDLE
@JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds; reads and checks every file."""
    from .bundle.manifest import open_bundle

    show_bundle(open_bundle(bundle), as_json)


@main.command()
@BUNDLE
@click.option("--against", type=click.Path(path_type=Path), required=True, help="Its checkpoint.")
@click.option("--text", type=click.Path(path_type=Path), help=TEXT)
@click.option("--tokens", type=click.IntRange(2), help="At most; default: what suits the model's size.")
@click.option("--store/--no-store", default=True, show_default=True, help="Keep the report in BUNDLE.")
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    help="What runs BUNDLE; the CPU rounds as a GPU would.",
)
@PROGRESS
@THREADS
@JSON
def verify(bundle: Path, against: Path, as_json: bool, progress: bool | None, **options: Any) -> None:
    """Compare BUNDLE with its checkpoint in float64; exit 1 if a gate fails."""
    from .parity.verify import verify as compare
    from .progress import bars

    with bars(progress) as shown:
        report = compare(bundle, against, progress=shown, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        where = f"at positions 0 to {report.positions - 1}, {report.reference_dtype} reference"
        rows = [("tokens", f"{report.tokens} ({report.text}) {where}")]
        rows += _difference_rows(report.logits)
        rows.append((f"one at a time, first {report.steps}", f"{report.step_error:.2e} max"))
        rows += [
            (f"state after {e.length}", f"{e.rms_relative_error:.2e} RMS-relative, layer {e.layer}")
            for e in report.state_errors
        ]
        rows += [
            (f"gate {v.metric}", f"{v.found:.2e} of {v.bound:.1e}{'' if v.passed else ' FAILED'}")
            for v in report.gates
        ]
        if report.decay_change is not None:
            rows.append(("", "analytic decay against the trained tables:"))
            rows += _difference_rows(report.decay_change)
        if not report.same_source:
            rows.append(("warning", "the bundle was exported from other files than this checkpoint's"))
        rows.append(("result", "passed" if report.passed else "FAILED"))
        print_table(rows)
    report.require()


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
            (
                "perplexity",
                f"{d.reference_perplexity:.4f} -> {d.perplexity:.4f} ({d.perplexity_change:+.4%})",
            )
        )
    return rows


@main.command()
@BUNDLE
@click.option("-p", "--prompt", help="Text to continue; default: standard input.")
@click.option("-n", "--max-tokens", type=int, default=128, show_default=True)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0: the most likely token."
)
@click.option("--top-k", type=int, default=0, show_default=True, help="0: off.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, help="Default: a new one each time.")
@click.option("--stop", multiple=True, help="Text that ends the output; may be given several times.")
@click.option("--stop-token", "stop_tokens", type=int, multiple=True, help="Token id that ends it.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's own end token.")
@PROVIDER
@click.option(
    "--cuda-graph/--no-cuda-graph",
    default=None,
    help="Replay decode steps as CUDA graphs; default: where they are proven equal.",
)
@THREADS
@JSON
def run(
    bundle: Path,
    prompt: str | None,
    provider: str,
    threads: int | None,
    cuda_graph: bool | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text from BUNDLE."""
    from .runtime.model import load

    model = load(bundle, provider=provider, threads=threads, cuda_graph=cuda_graph)
    records = model.generate(sys.stdin.read() if prompt is None else prompt, **sampling)
    text = []
    for record in records:
        text.append(record.text)
        if not as_json:
            click.echo(record.text, nl=False)
            sys.stdout.flush()
    if as_json:
        last = {name: value for name, value in vars(record).items() if name not in ("text", "token")}
        click.echo(json.dumps({"text": "".join(text), **last}))
        return
    detail = f" ({record.detail})" if record.detail else ""
    click.echo()
    click.echo(
        f"[{record.prompt_tokens} + {record.generated} tokens, "
        f"prefill {record.prefill_rate:,.0f} tokens/s, decode {record.decode_rate:,.0f} tokens/s, "
        f"finish: {record.finish_reason}{detail}]",
        err=True,
    )
