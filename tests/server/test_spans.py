"""Spans of OpenTelemetry."""

import subprocess
import sys
import time

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def spans():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    exporter.shutdown()  # the provider stays for the whole process: later spans are not kept
    exporter.clear()


def finished(spans, count):
    """So many spans: one ends a moment after its answer has come."""
    end = time.monotonic() + 5
    while len(spans.get_finished_spans()) < count and time.monotonic() < end:
        time.sleep(0.01)
    return spans.get_finished_spans()


@pytest.mark.parametrize("stream", [False, True])
def test_request_is_a_span_of_its_caller_with_its_tokens(spans, served, stream):
    spans.clear()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 5, "ignore_eos": True, "stream": stream}
    assert served.ask("/v1/completions", body, headers=[f"traceparent: {PARENT}"])[0] == 200
    (span,) = finished(spans, 1)
    assert (span.name, span.kind) == ("POST /v1/completions", trace.SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" in PARENT
    assert f"{span.parent.span_id:016x}" in PARENT
    told = dict(span.attributes)
    assert told == {
        "http.response.status_code": 200,
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 5,
    }
    served.ask("/nowhere")
    assert dict(finished(spans, 2)[-1].attributes) == {"http.response.status_code": 404}


def test_server_needs_no_opentelemetry():
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from dijiang.server import spans as s; print(s.traced(5))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "5\n"
