"""What the log says of an answer."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any


@dataclass
class Outcome:
    """What is noted of an answer until its end.

    route: as the figures name it; `shown`: as the log does, where that is another one.
    status: that the client was told, in a stream perhaps by its last piece.
    facts: what else the log says.
    """

    route: str
    shown: str = ""
    status: int = 200
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the request was asked."""
        return time.perf_counter() - self.started

    def line(self) -> str:
        """JSON: when it ended, by UTC, how, and how long it took."""
        milliseconds = round(1e3 * self.seconds, 1)
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        told = {"time": now, "route": self.shown or self.route, "status": self.status, "ms": milliseconds}
        return json.dumps(told | self.facts)
