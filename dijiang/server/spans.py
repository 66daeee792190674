"""OpenTelemetry: a span a request, where its API is installed. What becomes of spans, its SDK is told by others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None


def note(attributes: Mapping[str, str | int]) -> None:
    """Attributes of the request's span, by the conventions for generative AI."""
    if trace is not None:
        trace.get_current_span().set_attributes(attributes)


def traced(app: Any) -> Any:
    """An ASGI application with a span around each request, to the end of its stream; the headers name a parent."""
    if trace is None:
        return app
    tracer = trace.get_tracer("dijiang.server")

    async def spanned(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = propagate.extract(headers)
        with tracer.start_as_current_span(scope["method"], parent, trace.SpanKind.SERVER) as span:

            async def sent(message: Any) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await app(scope, receive, sent)
            if "route" in scope:  # known once the application has found it
                span.update_name(f"{scope['method']} {scope['route'].path}")

    return spanned
