"""How fast a session decodes: what `auto` asks before it takes a GPU."""

from __future__ import annotations

import time

from ...bundle.opened import Bundle
from ..state import State
from .base import Session

#: Steps before the clock starts: both sides of a state are captured by then.
WARM_STEPS = 4
#: Of each of two sessions that are compared: a second together.
SECONDS = 0.5


def decode_rate(session: Session, bundle: Bundle, seconds: float = SECONDS) -> float:
    """Greedy tokens a second, from an empty state."""
    state = State.empty(1, bundle.manifest.spec, bundle.manifest.fingerprint)
    limit = bundle.manifest.positions_limit
    token, steps, started = 0, -WARM_STEPS, time.perf_counter()
    while steps < 1 or time.perf_counter() < started + seconds:
        if steps == 0:
            started = time.perf_counter()
        step = session.step(state)
        step.ids[...], step.positions[:, 0] = token, state.position if limit is None else state.position % limit
        token = int(session.run(step, state).tokens[0, 0])
        steps += 1
    return steps / (time.perf_counter() - started)
