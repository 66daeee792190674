"""HTTP connections: how long a client may be silent, and how each of them ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Why the server ends a connection: what comes is no HTTP; no request comes; nobody reads the answer.
MALFORMED, SILENT, UNREAD = "malformed", "silent", "unread"


class Gentle:
    """A transport whose `close` asks the protocol how to end.

    Where bytes wait unread, a closed socket resets the connection, and the client loses the answer that says why.
    """

    def __init__(self, inner: Any, end: Callable[[Any], None]) -> None:
        self._inner, self._end, self._ended = inner, end, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def is_closing(self) -> bool:
        """Whether nothing more is said."""
        return self._ended or bool(self._inner.is_closing())

    def close(self) -> None:
        """Say nothing more."""
        if not self._ended:
            self._ended = True
            self._end(self._inner)


def patient_protocol(seconds: float, ended: Callable[[str], None] = lambda reason: None) -> type[H11Protocol]:
    """HTTP that ends connections of clients that neither send nor read for that time.

    Between two requests a connection rests, for as long as uvicorn is told to keep it alive.

    ended: is told why, where it is not the client that ends a connection.
    """

    class Patient(H11Protocol):
        _asks: asyncio.TimerHandle | None = None
        _reads: asyncio.TimerHandle | None = None
        _lingers: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(Gentle(transport, self._end))  # type: ignore[arg-type]
            self._expect_request()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._asks, self._reads, self._lingers, self.timeout_keep_alive_task):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._lingers is None:
                super().data_received(data)
                self._expect_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect_request()

        def send_400_response(self, msg: str) -> None:
            ended(MALFORMED)
            super().send_400_response(msg)

        def _expect_request(self) -> None:
            """A head has to come in time, from its first byte or from the start of a connection."""
            if self.transport.is_closing():
                return
            answers = self.cycle is not None and not self.cycle.response_complete
            comes = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
            rests = self.timeout_keep_alive_task is not None and not comes
            if (answers or rests) and self._asks is not None:
                self._asks.cancel()
                self._asks = None
            elif not (answers or rests) and self._asks is None:
                self._asks = self.loop.call_later(seconds, self._abort, SILENT)

        def _abort(self, reason: str) -> None:
            ended(reason)
            self.transport.abort()

        def _end(self, transport: Any) -> None:
            """Close; but where the client sends still, let it read the answer, and drop what comes."""
            if transport.is_closing() or self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
                transport.close()
                return
            self._lingers = self.loop.call_later(seconds, transport.abort)
            transport.write_eof()
            transport.resume_reading()

        def pause_writing(self) -> None:  # the client does not read as fast as we write
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reads is not None:
                self._reads.cancel()
                self._reads = None

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._watch()  # what it did not read keeps it open

        def _watch(self, before: float = float("inf")) -> None:
            """Look again and again whether the client reads; before: bytes that waited at the last look."""
            waits = self.transport.get_write_buffer_size()
            if waits >= before:
                self._abort(UNREAD)
            elif waits:
                if self._reads is not None:
                    self._reads.cancel()
                self._reads = self.loop.call_later(seconds, self._watch, waits)

    return Patient
