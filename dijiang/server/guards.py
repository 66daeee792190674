"""What keeps one client from harming the others: limits on bytes and time, and who may ask."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ..reading import parse_json
from .failures import Refused
from .settings import is_loopback

T = TypeVar("T")
#: Status in the logs where the client has gone before the answer.
GONE = 499
#: Where the rest of a request is not read.
CLOSE = {"Connection": "close"}
#: Bytes a second that a body has at least, after the first seconds.
LEAST_RATE = 10_000


def require_own_name(request: Request) -> None:
    """Refused where another site led a browser here: its page asks, or its name means this machine."""
    for header in ("host", "origin"):
        given = request.headers.get(header)
        if given is not None and not is_loopback(_host_in(given)):
            raise Refused(
                f"{header} is {given[:100]!r}, expected this machine (localhost); start the server with an API key",
                status=403,
                code="not_local",
            )


class LocalPages(CORSMiddleware):
    """Lets pages of this machine, whatever their port, read the answers: a browser asks first whether it may."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=("Retry-After",))

    def is_allowed_origin(self, origin: str) -> bool:
        return is_loopback(_host_in(origin))


def _host_in(given: str) -> str | None:
    try:
        return urlsplit(given if "://" in given else f"//{given}").hostname
    except ValueError:
        return None


def require_key(request: Request, key: str | None) -> None:
    """Refused unless the request has the server's key; takes as long whatever is wrong with it.

    key: None: who can reach the server may ask, but for other sites' pages.
    """
    if key is None:
        require_own_name(request)
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    hashes = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, key)]
    if not hmac.compare_digest(*hashes) or kind.lower() != "bearer":
        raise Refused(
            "the API key is missing or wrong; send it as Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: Request, most: int, seconds: float, deadline: float) -> Any:
    """The JSON of a request.

    seconds: that it may take, and more for each LEAST_RATE bytes.  deadline: of `time.monotonic`, for all of it.

    Raises:
        Refused: compressed (415), more bytes than `most` (413), slower than `seconds` (408), not all of it (499),
            or no JSON.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise Refused(
            f"the body's Content-Encoding is {coding[:20]!r}, expected none; send it uncompressed",
            status=415,
            headers=CLOSE,
        )
    data = bytearray()
    try:
        started = anyio.current_time()
        latest = started + max(0.0, deadline - time.monotonic())
        with anyio.fail_after(min(started + seconds, latest) - started) as scope:
            async for piece in request.stream():
                data += piece
                scope.deadline = min(started + seconds + len(data) / LEAST_RATE, latest)
                if len(data) > most:
                    raise Refused(f"the body has more than {most} bytes; send less", status=413, headers=CLOSE)
    except ClientDisconnect:
        raise Refused("the client left before its request was whole", status=GONE) from None
    except TimeoutError:
        took = anyio.current_time() - started
        told = f"the body came too slowly, {len(data)} bytes in {took:.1f} s; send it faster"
        raise Refused(told, status=408, headers=CLOSE) from None
    try:
        return parse_json(bytes(data))
    except ValueError as error:
        raise Refused(f"the body is no JSON ({error}); send an object") from None


async def until_gone(request: Request, work: Callable[[], Awaitable[T]]) -> T | None:
    """What `work` returns; None, and it was cancelled, if the client has gone."""
    found: T | None = None

    async def watch(scope: anyio.CancelScope) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    errors: list[Exception] = []
    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        try:
            found = await work()
        except Exception as error:  # out of the group as it is, not in an ExceptionGroup
            errors.append(error)
        group.cancel_scope.cancel()
    if errors:
        raise errors.pop()  # no local name keeps it: it holds this frame, and so would all of the request be kept
    return found


class EventStream(Response):
    """Server-sent events from an asynchronous generator; it is closed when the client goes.

    done: is called at the end, whatever that was; `ended` after it, with 499 if the client went, with 500 after a
        fault, else with None.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str], done: Callable[[], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events, self._done = events, done
        self.ended: Callable[[int | None], None] = lambda status: None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all events; see ASGI."""

        async def send_all() -> bool:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._events) as events:
                async for event in events:
                    body = b"data: " + event + b"\n\n"
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return True

        status: int | None = 500
        try:
            status = None if await until_gone(Request(scope, receive), send_all) else GONE
        finally:
            self._done()
            self.ended(status)
