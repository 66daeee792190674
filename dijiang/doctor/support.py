"""What becomes of every precision on every provider, by the tables of `dijiang.recipe`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..recipe import PRECISIONS, PROVIDERS, TARGETS, by_target


@dataclass(frozen=True)
class Support:
    """What becomes of one precision on one provider.

    target: of the export that it takes; None: it is refused.  graphs: of that export, that it runs.
    why: it is refused.
    """

    provider: str
    precision: str
    target: str | None
    graphs: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        if self.target is None:
            return f"refused: {self.why}"
        usual = self.target == next(iter(TARGETS))
        return ", ".join(self.graphs) + ("" if usual else f" (--target {self.target})")


def support() -> Iterator[Support]:
    """Every provider with every precision."""
    for provider, row in PROVIDERS.items():
        for precision, kind in PRECISIONS.items():
            recipes = by_target(precision).items()
            runs = {target: tuple(g for g in r.graphs if provider in r.providers(g)) for target, r in recipes}
            target = next((t for t, graphs in runs.items() if graphs), None)
            if target is None:
                why = row.refused.get(kind.type, "no target has a graph for it")
                yield Support(provider, precision, None, why=why)
            else:
                yield Support(provider, precision, target, runs[target])
