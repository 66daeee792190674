"""Figures of a running server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from .conversations import Conversations
from .hosted import Hosted
from .relay import Told

#: Seconds, up to the longest request that is usual.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Counted(Collector):
    """A counter that is kept elsewhere."""

    def __init__(self, name: str, help: str, count: Callable[[], int]) -> None:
        self._name, self._help, self._count = name, help, count

    def collect(self) -> Iterable[CounterMetricFamily]:
        """See prometheus_client."""
        yield CounterMetricFamily(self._name, self._help, value=self._count())


class Metrics:
    """What was answered, how fast, and what is on its way."""

    def __init__(self, models: Mapping[str, Hosted], conversations: Conversations) -> None:
        self._registry = made = CollectorRegistry()
        #: How many lines of the log are lost by now.
        self.log_lines_lost: Callable[[], int] = int
        self._requests = Counter("dijiang_requests", "Answers.", ["route", "status"], registry=made)
        self._tokens = Counter("dijiang_generated_tokens", "Tokens generated.", ["model"], registry=made)
        self._prompts = Counter("dijiang_prompt_tokens", "Tokens of prompts.", ["model"], registry=made)
        self._took = Histogram(
            "dijiang_request_seconds", "From asking to the end.", ["route"], registry=made, buckets=BUCKETS
        )
        self._first = Histogram(
            "dijiang_first_token_seconds", "From asking to a token.", ["model"], registry=made, buckets=BUCKETS
        )
        self._ended = Counter(
            "dijiang_connections_ended", "Connections that the server ended.", ["reason"], registry=made
        )
        Gauge("dijiang_conversations", "States kept.", registry=made).set_function(lambda: len(conversations))
        lost = "States that their folder could not take."
        made.register(Counted("dijiang_conversations_lost", lost, lambda: conversations.lost))
        made.register(
            Counted("dijiang_log_lines_lost", "Lines that stderr did not take.", lambda: self.log_lines_lost())
        )
        ProcessCollector(registry=made)
        load = Gauge("dijiang_generations", "Generations on their way.", ["model"], registry=made)
        slots = Gauge("dijiang_slots", "Generations at once at most.", ["model"], registry=made)
        for name, hosted in models.items():
            load.labels(name).set_function(lambda hosted=hosted: hosted.load)  # type: ignore[misc]
            slots.labels(name).set(hosted.slots)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()
        self._took.labels(route).observe(seconds)

    def ended(self, reason: str) -> None:
        """Count a connection that the server ended."""
        self._ended.labels(reason).inc()

    def asked(self, model: str, tokens: int) -> None:
        """Count the prompts of a request."""
        self._prompts.labels(model).inc(tokens)

    def told(self, model: str, told: Told) -> None:
        """Count a token."""
        record = told.record
        self._tokens.labels(model).inc()
        if record.generated == 1 and told.choice == 0 and record.prefill_rate:
            self._first.labels(model).observe(record.prompt_tokens / record.prefill_rate)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
