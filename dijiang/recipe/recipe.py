"""`resolve` decides what a bundle is made of; a `Recipe` is what was decided, and its manifest keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import BundleError, ExportError, reason
from .backends import PROVIDERS
from .forms import GRAPHS, SCHEMES
from .precisions import BLOCKS, HEADS, PRECISIONS, TYPE_BYTES, Blocks, Gate, Precision
from .rows import require
from .targets import TARGETS, Target

AUTO = "auto"


@dataclass(frozen=True)
class Budget:
    """A size that the weights may have, and the projections that keep more bits within it (ADR 0038).

    bytes: of all weights, at most.  blocks: how those projections are stored.  kept: names of their weights.
    """

    bytes: int
    blocks: Blocks
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What one bundle is made of; its manifest keeps it.

    type: of activations and of weights that are not in blocks.  scheme: a row of SCHEMES.
    graphs: rows of GRAPHS, the best first; they share every weight.
    calibration_tokens: to round by; None: as many as pay.  budget: None: every projection is as `body` says.
    """

    precision: str
    target: str
    type: str
    scheme: str
    graphs: tuple[str, ...]
    gates: tuple[Gate, ...]
    body: Blocks | None = None
    head: Blocks | None = None
    embed: Blocks | None = None
    calibration_tokens: int | None = None
    budget: Budget | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether weights are blocks of integers."""
        return self.body is not None

    def providers(self, graph: str) -> tuple[str, ...]:
        """What may run one of its graphs."""
        return tuple(
            name
            for name, row in PROVIDERS.items()
            if graph in row.graphs and self.scheme in row.schemes and self.type in row.types
        )

    def onnxruntime(self, graph: str) -> tuple[int, int]:
        """The oldest version that runs one of its graphs."""
        row = GRAPHS[graph]
        return max(row.onnxruntime, row.integers_from) if self.in_blocks else row.onnxruntime

    def projection(self, name: str) -> Blocks | None:
        """How the projection with a weight of this name is stored."""
        return self.budget.blocks if self.budget is not None and name in self.budget.kept else self.body

    @property
    def title(self) -> str:
        """Its precision, and what a budget was spent on, in a few words."""
        if self.budget is None:
            return self.precision
        spent = f"{len(self.budget.kept)} projections in {self.budget.blocks.bits} bits"
        return f"{self.precision} within {self.budget.bytes / 1e6:,.1f} MB: {spent}"

    def keeping(self, kept: Iterable[str]) -> Recipe:
        """With the projections that its budget is spent on, by the names of their weights."""
        assert self.budget is not None
        return replace(self, budget=replace(self.budget, kept=tuple(kept)))

    def fitted(self, embed: Blocks | None, tokens: int) -> Recipe:
        """With what depends on a model's shape: how its embedding is stored, and the tokens to round by."""
        return replace(self, embed=embed, calibration_tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Read what `to_dict` wrote; BundleError for anything else."""
        try:
            blocks = {
                name: None if data[name] is None else Blocks(**data[name]) for name in ("body", "head", "embed")
            }
            gates = tuple(Gate(str(g["metric"]), float(g["bound"])) for g in data["gates"])
            graphs = tuple(str(name) for name in data["graphs"])
            spent = data.get("budget")  # no bundle before 0.3 has one
            budget = None if spent is None else _budget(**spent)
            found = cls(**{**data, **blocks, "gates": gates, "graphs": graphs, "budget": budget})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"recipe: not a whole one ({reason(error)}); export the bundle again") from error
        for what, value, rows in (
            ("graph", graphs, GRAPHS),
            ("scheme", (found.scheme,), SCHEMES),
            ("type", (found.type,), TYPE_BYTES),
        ):
            if unknown := [name for name in value if name not in rows]:
                raise BundleError(f"recipe: {what} {unknown[0]!r} is unknown; upgrade dijiang")
        return found


def _budget(bytes: int, blocks: dict[str, Any], kept: Iterable[str]) -> Budget:
    return Budget(bytes, Blocks(**blocks), tuple(map(str, kept)))


def resolve(
    precision: str = "fp32",
    *,
    graph: str = AUTO,
    target: str = "onnxruntime",
    head_precision: str | None = None,
    block_size: int | None = None,
    calibration_tokens: int | None = None,
    budget: float | None = None,
    runs_here: Callable[[str], bool] = lambda name: True,
) -> Recipe:
    """Decide what a bundle is made of.

    Args:
        graph: only this one; `auto`: those of the target that run here and share all weights.
        head_precision, block_size, calibration_tokens: None: as the precision says.
        budget: MB that the weights may have; None: projections are all alike.
        runs_here: whether this machine runs a graph, so that it can be verified.

    Raises:
        ExportError: an unknown name, or choices that do not go together.
    """
    require("precision", precision, PRECISIONS)
    require("target", target, TARGETS)
    require("graph", graph, (AUTO, *GRAPHS))
    row, goal = PRECISIONS[precision], TARGETS[target]
    choices = {name: _variant(row, goal, name) for name in _candidates(row, goal, graph, target)}
    if not choices:
        raise ExportError(f"no graph for target {target} has precision {precision}; choose another of either")
    first = next((name for name in choices if runs_here(name)), next(iter(choices)))
    scheme = _scheme(row, goal, first, precision)
    recipe = Recipe(
        precision=precision,
        target=target,
        type=SCHEMES[scheme].type or row.type,
        scheme=scheme,
        graphs=tuple(
            name
            for name, variant in choices.items()
            if name == first or (variant == choices[first] and runs_here(name))
        ),
        gates=row.gates,
        body=row.body,
        head=row.head,
        embed=row.embed,
    )
    tuned = _tuned(recipe, head_precision, block_size, calibration_tokens)
    return tuned if budget is None else with_budget(tuned, budget)


def by_target(precision: str) -> dict[str, Recipe]:
    """A precision's default recipe for each target that has a graph for it."""
    type_ = PRECISIONS[precision].type
    able = [name for name, goal in TARGETS.items() if any(type_ in GRAPHS[graph].types for graph in goal.graphs)]
    return {name: resolve(precision, target=name) for name in able}


def _candidates(row: Precision, goal: Target, graph: str, target: str) -> list[str]:
    """Graphs that may be written."""
    found = [name for name in goal.graphs if row.type in GRAPHS[name].types]
    if graph == AUTO:
        return found
    if row.type not in GRAPHS[graph].types:
        raise ExportError(
            f"the {graph} graph has activations in {' or '.join(GRAPHS[graph].types)} only, not in {row.type}; "
            "leave --graph out, or export with --precision int8"
        )
    if graph not in goal.graphs and not goal.others:
        raise ExportError(
            f"target {target} needs the {' or '.join(goal.graphs)} graph, not {graph}; leave --graph out"
        )
    return [graph]


def _variant(row: Precision, goal: Target, graph: str) -> tuple[object, ...]:
    """What decides the weights' bytes: graphs of one variant share them all."""
    scheme = SCHEMES[goal.blocks.get(graph, "floats") if row.body else "floats"]
    type_ = scheme.type or row.type
    # In 16 bits a graph of single nodes stores other norms' weights in the type than one that is not.
    return scheme.code, type_, GRAPHS[graph].fused if type_ != "fp32" else None


def _scheme(row: Precision, goal: Target, graph: str, precision: str) -> str:
    if row.body is None:
        return "floats"
    if graph not in goal.blocks:
        other = next((name for name, one in TARGETS.items() if graph in one.blocks), None)
        advice = "export with --precision fp32" if other is None else f"add --target {other}"
        raise ExportError(
            f"precision {precision} for this target needs one of the graphs {', '.join(goal.blocks)}, not {graph}; "
            f"leave --graph out, or {advice}"
        )
    return goal.blocks[graph]


def _tuned(recipe: Recipe, head: str | None, block: int | None, tokens: int | None) -> Recipe:
    """The recipe with the head's precision, the block size and the calibration that were asked for."""
    if head is not None:
        require("head precision", head, HEADS)
    if block is not None and (block not in BLOCKS or not isinstance(block, int)):
        raise ExportError(f"block size {block!r} is unknown, expected one of {', '.join(map(str, BLOCKS))}")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 0):
        raise ExportError(f"calibration tokens {tokens!r}, expected a whole number, 0 or more; change them")
    if not recipe.in_blocks:
        if head is not None or block is not None or tokens:
            raise ExportError(
                f"precision {recipe.precision} has no head precision, block size or calibration; use --precision "
                "int8 or int4"
            )
        return recipe
    if (head or block or tokens) and not SCHEMES[recipe.scheme].tunable:
        raise ExportError(
            "--head-precision, --block-size and --calibration-tokens have no meaning in the "
            f"{recipe.graphs[0]} graph, whose blocks are what TensorRT reads; leave them out"
        )
    body, kept, embed = (
        None if blocks is None else replace(blocks, block=block or blocks.block)
        for blocks in (recipe.body, recipe.head, recipe.embed)
    )
    if head is not None:
        found = HEADS[head]
        kept = None if found is None else replace(found, block=block or found.block)
    return replace(recipe, body=body, head=kept, embed=embed, calibration_tokens=tokens)


def with_budget(recipe: Recipe, megabytes: float) -> Recipe:
    """The recipe with a size that its weights may have; what that is spent on is measured later.

    ExportError where all projections are alike, or for a size that is none.
    """
    kept = PRECISIONS[recipe.precision].kept
    if kept is None or recipe.body is None or not SCHEMES[recipe.scheme].tunable:
        able = " or ".join(name for name, row in PRECISIONS.items() if row.kept is not None)
        raise ExportError(
            f"a budget has no meaning in precision {recipe.precision} and the {recipe.graphs[0]} graph: "
            f"all weights of one kind are alike there; use --precision {able}, or leave --budget out"
        )
    if not 0 < megabytes * 1e6 < math.inf:
        raise ExportError(f"budget {megabytes!r} MB, expected more than 0; give the MB that the weights may have")
    blocks = replace(kept, block=recipe.body.block)
    return replace(recipe, budget=Budget(round(megabytes * 1e6), blocks))
