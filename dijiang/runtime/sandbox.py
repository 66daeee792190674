"""Renders chat templates of any origin: a program of its own, without dijiang; `renderer.Renderer` starts it.

A request is a line: the seconds that it may take, a space, and JSON: {"source", "variables"}; without variables the
template is only compiled. An answer is a line of JSON: {"text"}; {"broken": why}, the source is no template;
{"refused": why}, by the template.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Bytes of memory that a template may take, with this program; characters that it may write.
MEMORY, LONGEST = 1 << 30, 1 << 24


class Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; here it is its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def environment() -> Any:
    """Jinja as templates of transformers expect it."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


@lru_cache(8)
def compiled(source: str) -> Any:
    return environment().from_string(source)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """To a request, see the module. Whatever a template raises is its own fault."""
    try:
        template = compiled(request["source"])
    except Exception as error:
        return {"broken": said(error)}
    try:
        text = template.render(request["variables"]) if "variables" in request else ""
    except Exception as error:
        return {"refused": said(error)}
    if len(text) > LONGEST:
        return {"refused": f"it writes {len(text)} characters, expected at most {LONGEST}"}
    return {"text": text}


def said(error: Exception) -> str:
    """What an error says; its kind where it says nothing."""
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY >> 20} MiB of memory"
    return str(error) or type(error).__name__


def limit_memory() -> None:
    """To MEMORY, where the system does that."""
    try:
        import resource
    except ImportError:
        return
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    if most == resource.RLIM_INFINITY or most > MEMORY:
        with suppress(OSError, ValueError):  # macOS has the name only
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def limit_seconds(seconds: float) -> None:
    """End this process then, whatever it does, also where who started it has ended; 0: no longer."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    limit_memory()
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever who started it made of that
    say(b"")  # that it runs
    for line in sys.stdin.buffer:
        seconds, _, request = line.partition(b" ")
        limit_seconds(float(seconds))
        made = json.dumps(answer(json.loads(request))).encode()
        limit_seconds(0)
        say(made)


def say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
