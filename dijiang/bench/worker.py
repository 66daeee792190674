"""The process that a model is measured in.

The parent says which test to repeat and when, so that depths, and models that are compared, take turns.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from ..errors import BenchError, DijiangError
from .matrix import Test
from .subject import Load, Side


class Worker:
    """A child process with one side and tests that differ only in depth or way.

    Raises BenchError, or the child's DijiangError, from any method: a child that the system killed
    takes nothing with it.
    """

    def __init__(self, side: Side, provider: str, tests: Sequence[Test]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        known = (other, side.load, side.path, provider, tests)
        self._process = context.Process(target=_serve, args=known, daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def start(self) -> tuple[float, str, dict[str, Any]]:
        """Load, reach the depths, warm up; seconds of the load, what really runs it, its facts."""
        return self._receive()

    def repeat(self, test: Test) -> list[float]:
        """One repetition of a test; see Subject.seconds."""
        return self._ask(test)

    def finish(self) -> dict[str, int | None]:
        return self._ask(None)

    def _ask(self, test: Test | None) -> Any:
        # A child that died before it was asked breaks the pipe; its last words are still in it.
        with suppress(ConnectionError):
            self._pipe.send(test)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise BenchError(_death(self._process.exitcode)) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _death(status: int | None) -> str:
    if status == -signal.SIGKILL:
        return "the process was killed, probably for want of memory; use a smaller batch or depth"
    return f"the process ended with status {status}, expected a result; run this test alone"


def _serve(pipe: Connection, load: Load, path: str, provider: str, tests: Sequence[Test]) -> None:
    """The child: answers one message a request until it is told to finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    try:
        started = time.perf_counter()
        subject = load(path, tests[0].threads, provider)
        seconds = time.perf_counter() - started
        subject.prepare(tests)
        for test in tests:
            subject.warm_up(test)
        pipe.send((seconds, subject.provider, subject.facts))
        while asked := pipe.recv():
            pipe.send(subject.seconds(asked))
        pipe.send(subject.peaks())
    except (EOFError, ConnectionError):
        return  # the parent has gone
    except DijiangError as error:
        pipe.send(error)
    except MemoryError:
        pipe.send(BenchError("not enough memory; use a smaller batch or depth"))
    except Exception as error:
        pipe.send(BenchError(f"{type(error).__name__}: {error}; run this test alone"))
