"""Snapshots that can be proven: what follows a state is kept with it, and computed again."""

from __future__ import annotations

from dataclasses import asdict, fields

import numpy as np

from ..errors import InputError
from ..version import __version__
from .model import Model
from .options import ALONE, Generation
from .sampling import largest
from .snapshot import Note, Snapshot
from .state import State

#: Most likely tokens after the pending one whose logits are kept.
TOP = 8
#: What a note says of how tokens were drawn.
NOTED = frozenset(one.name for one in fields(Generation)) - {"max_tokens", *ALONE}
#: Difference of logits, as part of their range: allowed to sums in another order, and to other rounding.
SAME, ROUNDED = 1e-4, 0.1


def made_by(model: Model) -> dict[str, str]:
    """What a state that this model advances was made by."""
    recipe = model.manifest.recipe
    return {"dijiang": __version__, "precision": recipe.precision, "graph": model.graph, "provider": model.provider}


def take(model: Model, state: State, options: Generation) -> Snapshot:
    """The state of a generation as it is now, with a note; it is not advanced. See `State.snapshot`."""
    sampler = {name: value for name, value in asdict(options).items() if name in NOTED}
    model.adopt(state)
    logits = _following(model, state)
    found = () if logits is None else tuple((int(t), float(logits[t])) for t in largest(logits, TOP))
    return state.snapshot(Note(made_by(model), sampler, found))


def resumed(model: Model, kept: Snapshot) -> State:
    """The state in a snapshot, for a model to go on from; InputError: it is of another checkpoint or vocabulary."""
    state = State.of(kept)
    state.check(model.spec, model.manifest.fingerprint)
    model.adopt(state)
    return state


def verify(model: Model, kept: Snapshot) -> str:
    """Compute what follows a snapshot again, on a clone; one line that says how near it is.

    Raises:
        InputError: it is of another checkpoint, holds nothing to compare, or what follows differs.
    """
    logits = _following(model, resumed(model, kept))
    if logits is None or not kept.note.top:
        raise InputError("the state holds no pending token with its logits; save it with dijiang run --save-state")
    tokens, expected = zip(*kept.note.top, strict=True)
    if not all(0 <= token < len(logits) for token in tokens):
        raise InputError("the state keeps logits of tokens that are not in the vocabulary; save it again")
    worst = float(np.abs(logits[list(tokens)] - expected).max() / np.ptp(logits))
    made, here = kept.note.made, made_by(model)
    exact = not model.manifest.recipe.in_blocks or made.get("graph") == here["graph"]
    allowed = SAME if exact and made.get("precision") == here["precision"] else ROUNDED
    if not worst <= allowed:
        raise InputError(
            f"what follows the state is {worst:.1e} of the logits' range off, allowed {allowed:.0e}; "
            "do not use this file, or export the bundle again"
        )
    return f"what follows the state is as it was: {worst:.1e} of the logits' range off, allowed {allowed:.0e}"


def _following(model: Model, state: State) -> np.ndarray | None:
    """Logits [vocab] after the pending token, on a clone; None: there is none, or no position for it."""
    seam, limit = state.seam(), model.manifest.positions_limit
    if state.batch != 1 or seam is None or (limit is not None and seam.at >= limit):
        return None
    return model.forward(np.array([[seam.token]]), state.clone())[0]
