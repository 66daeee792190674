"""Figures of a running server, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .conversations import Conversations
from .hosted import Hosted, Told


class Metrics:
    """What was answered, how fast, and what is on its way."""

    def __init__(self, models: Mapping[str, Hosted], conversations: Conversations) -> None:
        self._registry = made = CollectorRegistry()
        self._requests = Counter("dijiang_requests", "Answers.", ["route", "status"], registry=made)
        self._tokens = Counter("dijiang_generated_tokens", "Tokens generated.", ["model"], registry=made)
        self._prompts = Counter("dijiang_prompt_tokens", "Tokens of prompts.", ["model"], registry=made)
        self._first = Histogram("dijiang_first_token_seconds", "From asking to a token.", ["model"], registry=made)
        Gauge("dijiang_conversations", "States kept.", registry=made).set_function(lambda: len(conversations))
        lost = Gauge("dijiang_conversations_lost", "States that their folder could not take.", registry=made)
        lost.set_function(lambda: conversations.lost)
        load = Gauge("dijiang_generations", "Generations on their way.", ["model"], registry=made)
        slots = Gauge("dijiang_slots", "Generations at once at most.", ["model"], registry=made)
        for name, hosted in models.items():
            load.labels(name).set_function(lambda hosted=hosted: hosted.load)  # type: ignore[misc]
            slots.labels(name).set(hosted.slots)

    def answered(self, route: str, status: int) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()

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
