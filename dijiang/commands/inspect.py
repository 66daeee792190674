"""dijiang inspect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..bundle.manifest import Manifest
from ..bundle.opened import Bundle, open_bundle
from ..bundle.sizes import sizes
from ..errors import InputError
from ..files import write_file
from ..models.config import brief
from ..runtime.sessions.engines import EngineRecord
from ..runtime.sessions.inference import why_not
from ..typed import check_types
from . import FILE, JSON, ModelFolder, graph_option, model_folder, print_json, print_table, refuse_given

#: Pixels above a picture, for its title.
TITLE = 30


@click.command()
@model_folder("bundle")
@click.option("--draw", type=FILE, help="Draw the nodes of a layer into this .svg file.")
@click.option("--layer", type=click.IntRange(0), default=0, show_default=True, help="Which one --draw draws.")
@click.option(
    "--before", type=ModelFolder(), help="Its checkpoint: --draw shows the layer before the passes, too, beside it."
)
@graph_option("Which graph --draw draws; default: the first of the bundle.")
@JSON
def inspect(
    bundle: Path, draw: Path | None, layer: int, before: Path | None, graph: str | None, as_json: bool
) -> None:
    """Show what BUNDLE holds; reads and checks every file."""
    if draw is None:
        refuse_given(("layer", "before", "graph"), "without --draw FILE")
    elif draw.suffix.lower() != ".svg":
        raise InputError(f"{draw}: the picture is SVG, expected a name that ends in .svg; rename it")
    opened = open_bundle(bundle)
    if draw is not None:
        draw_layer(opened, graph, layer, draw, before)
    show_bundle(opened, as_json)


def draw_layer(bundle: Bundle, graph: str | None, layer: int, file: Path, checkpoint: Path | None = None) -> None:
    """Write the picture of a layer.

    graph: None: the bundle's first one.  checkpoint: None: only what the passes made of the layer is drawn.
    """
    import onnx_ir

    from ..graph.drawing import draw
    from ..graph.strangers import reading
    from ..graph.writer import write_graph
    from ..parity.verify import checkpoint_of

    chosen = graph or next(iter(bundle.manifest.graphs))
    bundle.require_graph(chosen)
    with reading(bundle.graph_file(chosen)):
        picture = draw(onnx_ir.load(bundle.graph_file(chosen)).graph, layer)
    if checkpoint is not None:
        before = draw(write_graph(checkpoint_of(bundle, checkpoint), chosen).graph, layer)
        picture = beside({"before the passes": before, f"after them: {chosen}": picture})
    write_file(file, picture.encode(), InputError)


def beside(pictures: Mapping[str, str]) -> str:
    """SVG pictures (title -> picture that begins with its size) as one, side by side."""
    right, bottom, parts = 0, 0, ['<rect width="100%" height="100%" fill="white"/>']
    for title, picture in pictures.items():
        width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', picture)[0])
        parts.append(f'<text x="{right + 20}" y="20" font-family="sans-serif" font-size="16">{title}</text>')
        placed = f'<svg x="{right}" y="{TITLE}" width="{width}" height="{height}" '
        parts.append(picture.replace("<svg ", placed, 1))
        right, bottom = right + width, max(bottom, TITLE + height)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom}">'
    return f"{head}{''.join(parts)}</svg>\n"


NOT_JUDGED = "not judged: its text makes no sense yet"
VERDICTS = {True: "passed", False: "FAILED", None: "not verified"}


def show_bundle(bundle: Bundle, as_json: bool) -> None:
    """Print it on stdout."""
    manifest, spec, found = bundle.manifest, bundle.manifest.spec, sizes(bundle)
    if as_json:
        print_json(
            asdict(manifest)
            | {"bytes": bundle.nbytes, "path": str(bundle.path), "sizes": asdict(found)}
            | {"sampling": bundle.sampling}
        )
        return
    limit = manifest.positions_limit
    engines = {name: EngineRecord.from_dict(entry) for name, entry in manifest.engines.items()}
    print_table(
        [
            ("bundle", str(bundle.path)),
            ("model", f"{spec.family}, {spec.num_layers} layers of {spec.hidden_size}, {spec.num_heads} heads"),
            ("vocabulary", f"{spec.vocab_size:,}"),
            ("end tokens", ", ".join(map(str, spec.eos_token_ids)) or "none: text ends with --max-tokens"),
            *([("sampling", _sampling_line(bundle.sampling))] if bundle.sampling else []),
            ("precision", manifest.recipe.title),
            *(("graph", _graph_line(bundle, name)) for name in manifest.graphs),
            ("parameters", f"{found.parameters:,}"),
            ("size", f"{bundle.nbytes / 1e6:,.1f} MB"),
            ("state", f"{spec.state_bytes / 1e6:,.3f} MB a sequence, at any length"),
            ("memory", f"{found.memory_bytes / 1e6:,.1f} MB: weights and one state, at any length"),
            (
                "against a cache",
                f"a vanilla fp16 cache of this shape is larger from {found.cache_larger_from:,} "
                "tokens on: " + ", ".join(f"{b / 1e6:,.1f} MB at {n:,}" for n, b in found.cache_bytes.items()),
            ),
            ("positions", "no end" if limit is None else f"{limit}: {manifest.limit_reason}"),
            ("decay", manifest.decay),
            *([("calibration", line)] if (line := _calibration_line(manifest)) else []),
            ("parity", _verdict(bundle, bundle.passed)),
            *([("from float64", cost_line(report))] if (report := bundle.parity) else []),
            ("signature", "none" if manifest.signature is None else "there: --require-signature checks it"),
            *(("warning", text) for text in manifest.warnings),
            *(
                ("engine", f"{name} {e.version} for {', '.join(e.gpus)}, batch {e.batch}")
                for name, e in engines.items()
            ),
            ("written by", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())),
        ]
    )


def _calibration_line(manifest: Manifest) -> str:
    """What integers were rounded by; "": by nothing."""
    tokens, text = manifest.recipe.calibration_tokens, manifest.calibration
    if not tokens:
        return ""
    return f"on {tokens:,} tokens{'' if text is None else f' of {text.text}'}"


def _sampling_line(found: dict[str, Any]) -> str:
    """The defaults of a checkpoint's authors; `run` has its own."""
    return ", ".join(f"{name} {brief(value)}" for name, value in found.items()) + " (its authors' choice)"


def cost_line(report: Any) -> str:
    """What the first graph differs by, from the report that is kept; it may be anybody's."""
    from ..parity.difference import Difference

    try:
        found = Difference(**report["logits"])
        check_types(found)
        parts = [f"KL {found.kl:.1e} nats", f"top-1 agreement {found.top1_agreement:.2%}"]
        if found.perplexity_change is not None:
            parts.append(f"perplexity {found.perplexity_change:+.2%}")
        told = f"{', '.join(parts)}, on {report['tokens']} tokens ({report['text']})"
        shared = report.get("calibrated_on", 0)
        return f"{told}; {calibrated_on(shared)}" if shared else told
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return "the report is another dijiang's; dijiang verify writes one"


def calibrated_on(tokens: int) -> str:
    """That a figure is too good."""
    return f"{tokens:,} tokens are of the text that it was calibrated on: elsewhere it is further off"


def _graph_line(bundle: Bundle, name: str) -> str:
    """What a graph is, its verdict, and whether it runs here."""
    record = bundle.manifest.graphs[name]
    here = why_not(name, record.oldest)
    runs = f"not here: {here}" if here else f"runs on {', '.join(record.providers)}"
    return f"{name}: {_verdict(bundle, record.passed)}, {runs}"


def _verdict(bundle: Bundle, passed: bool | None) -> str:
    if passed is None and bundle.parity is not None:
        return f"{NOT_JUDGED}; fine-tune the checkpoint"
    return VERDICTS[passed]
