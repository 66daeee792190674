"""The routes of the server, as a Starlette application."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import DijiangError
from ..runtime.state import State
from ..runtime.state_folder import StateFolder
from .about import about
from .answers import Answer, encoded
from .conversations import Conversations
from .echo import echoed
from .failures import Refused, refusal
from .front_page import FILES, page
from .guards import GONE, EventStream, LocalPages, read_body, require_key, until_gone
from .hosted import Hosted
from .metrics import Metrics
from .openapi import document
from .outcome import Outcome
from .relay import Job, Told
from .settings import Serving
from .spans import note, traced
from .wanted import Wanted, read

log = logging.getLogger("dijiang.server")
#: Bytes of a request beside a sealed state.
BODY = 1 << 20
T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Server:
    """Models by their names, and what is common to them."""

    def __init__(
        self,
        models: Sequence[Hosted],
        settings: Serving,
        *,
        api_key: str | None = None,
        seal_key: bytes | None = None,
        largest_state: int = 0,
    ) -> None:
        self.models = {hosted.name: hosted for hosted in models}
        self.settings, self._key = settings, api_key
        place = settings.conversation_folder
        folder = None if place is None else StateFolder(Path(place), settings.conversation_disk << 20)
        self.conversations = Conversations(settings.conversations, seal_key, folder)
        self._keeper = anyio.CapacityLimiter(1)
        self.metrics = Metrics(self.models, self.conversations)
        self._folders = {str(hosted.model.bundle.path): name for name, hosted in self.models.items()}
        self._most = settings.max_body or BODY + largest_state

    def cancel(self) -> None:
        """All answers end, with an error where they are not finished."""
        for hosted in self.models.values():
            hosted.batcher.close()

    def app(self) -> Any:
        """The ASGI application."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            for hosted in self.models.values():
                hosted.start()
            try:
                yield
            finally:
                for hosted in self.models.values():
                    await anyio.to_thread.run_sync(hosted.stop)
                await anyio.to_thread.run_sync(self.conversations.close)

        routes = [
            self._route("POST", "/v1/completions", self._completions),
            self._route("POST", "/v1/chat/completions", self._chat),
            self._route("GET", "/v1/models", self._models),
            self._route("GET", "/v1/models/{name:path}", self._model),
            self._route("POST", "/tokenize", self._tokenize),
            self._route("GET", "/openapi.json", self._openapi),
            self._route("GET", "/metrics", self._metrics),
            self._route("GET", "/healthz", self._health, guarded=False),
            self._route("GET", "/readyz", self._ready, guarded=False),
            self._route("GET", "/health", self._ready, guarded=False),  # the name in vLLM and llama.cpp
            *(self._route("GET", path, page, guarded=False) for path in FILES),
        ]
        handlers: dict[Any, Any] = {HTTPException: self._refused_route(routes), Exception: _broken}
        pages = [Middleware(LocalPages)]
        made = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers, middleware=pages)
        made.router.redirect_slashes = False  # behind a proxy it would lead elsewhere
        return traced(made)

    def _route(self, method: str, path: str, handler: Handler, *, guarded: bool = True) -> Route:
        """A route whose errors have OpenAI's shape, and that is counted and logged. guarded: it needs the key."""

        async def handled(request: Request) -> Response:
            outcome = request.state.outcome = Outcome(path)
            try:
                if guarded:
                    require_key(request, self._key)
                response = await handler(request)
            except DijiangError as error:
                refused = refusal(error, self._folders)
                response = _json(refused.body, refused.status, refused.headers)
            except Exception:  # `_broken` answers it
                self._note(outcome, 500)
                raise
            if isinstance(response, EventStream):  # it has not begun
                response.ended = lambda status: self._note(outcome, status or outcome.status)
            else:
                self._note(outcome, response.status_code)
            return response

        return Route(path, handled, methods=[method])

    def _refused_route(
        self, routes: Sequence[Route]
    ) -> Callable[[Request, HTTPException], Coroutine[Any, Any, Response]]:
        """What is said where there is no such route, or not with this method: what there is."""
        ours = [route for route in routes if route.path.startswith("/v1") and "{" not in route.path]
        known = ", ".join(f"{min(route.methods or ())} {route.path}" for route in ours)
        paths = {route.path for route in routes}

        async def refused(request: Request, error: HTTPException) -> Response:
            path, status, headers = request.url.path, error.status_code, dict(error.headers or {})
            shown = path[:100]
            told = (
                f"there is no route {request.method} {shown!r}, expected one of {known}; have the client use these"
            )
            if "Allow" in headers:
                told = f"{shown!r} does not take {request.method}, expected {headers['Allow']}; change the method"
            # A figure has few labels: clients may try any number of paths.
            self._note(Outcome(path if path in paths else "other", shown), status)
            return _json(Refused(told, status=status).body, status, headers)

        return refused

    def _note(self, outcome: Outcome, status: int) -> None:
        """Count and log an answer, at its end."""
        outcome.status = status
        self.metrics.answered(outcome.route, status, outcome.seconds)
        log.info(outcome.line())

    # What is asked for.

    async def _completions(self, request: Request) -> Response:
        return await self._generate(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, chat=True)

    async def _generate(self, request: Request, *, chat: bool) -> Response:
        deadline = time.monotonic() + self.settings.timeout
        body = await self._body(request, deadline)
        hosted = self._hosted(body)
        wanted = read(body, self.settings, hosted.sampling, chat=chat)
        state = await self._state(wanted)
        cached = 0 if state is None else int(state.position[0])
        job = await hosted.job(wanted, state, deadline)
        tokenizer = hosted.model.tokenizer if hosted.model.has_tokenizer else None
        fed = sum(len(turn.plan.ids) for turn in job.turns) // wanted.n
        self.metrics.asked(hosted.name, fed)
        syntax = None if wanted.offer is None else hosted.syntax
        echoes = echoed(wanted, job, tokenizer)
        answer = Answer(wanted, tokenizer, prompt_tokens=cached + fed, cached=cached, syntax=syntax, echoes=echoes)
        outcome = request.state.outcome
        outcome.facts |= {"id": answer.id, "model": hosted.name}
        headers = {"X-Request-Id": answer.id}
        told = self._told(hosted, job, counted=not wanted.silent)
        if wanted.stream:
            return EventStream(self._events(told, job, wanted, answer, outcome), headers, job.close)

        async def whole() -> Response:
            async with aclosing(told) as tokens:
                async for token in tokens:
                    answer.take(token)
            await self._finish(job, wanted, answer, outcome)

            def made() -> Response:
                return _json(answer.whole(), headers=headers)

            return await anyio.to_thread.run_sync(made) if echoes else made()

        try:
            return await until_gone(request, whole) or Response(status_code=GONE)
        finally:
            job.close()

    async def _told(self, hosted: Hosted, job: Job, *, counted: bool) -> AsyncGenerator[Told, None]:
        """All tokens."""
        async with aclosing(job.told()) as tokens:
            async for told in tokens:
                if counted:
                    self.metrics.told(hosted.name, told)
                yield told

    async def _events(
        self, told: AsyncGenerator[Told, None], job: Job, wanted: Wanted, answer: Answer, outcome: Outcome
    ) -> AsyncGenerator[bytes, None]:
        """The pieces of a stream; what goes wrong once it has begun is its last but one."""
        try:
            for piece in answer.opening():
                yield encoded(piece)
            async with aclosing(told) as tokens:
                async for token in tokens:
                    yield encoded(answer.take(token))
            await self._finish(job, wanted, answer, outcome)
            for piece in answer.closing():
                yield encoded(piece)
        except DijiangError as error:
            refused = refusal(error, self._folders)
            outcome.status = refused.status
            yield encoded(refused.body)
        yield b"[DONE]"

    async def _state(self, wanted: Wanted) -> State | None:
        """What is continued."""
        if wanted.sealed is not None:
            return await self._kept(self.conversations.open, wanted.sealed)
        return None if wanted.previous is None else await self._kept(self.conversations.find, wanted.previous)

    async def _kept(self, work: Callable[..., T], *given: Any) -> T:
        """What conversations do, one after another, in a thread: a slow disk stops nobody else."""
        return await anyio.to_thread.run_sync(work, *given, limiter=self._keeper)

    async def _finish(self, job: Job, wanted: Wanted, answer: Answer, outcome: Outcome) -> None:
        """Keep the state, or give it to the client; say what was not fed."""
        answer.spared(sum(turn.reused for turn in job.turns))
        usage = answer.usage
        outcome.facts |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        note(
            {
                "gen_ai.request.model": wanted.model,
                "gen_ai.usage.input_tokens": usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": usage["completion_tokens"],
            }
        )
        if wanted.store:
            await self._kept(self.conversations.store, answer.id, job.turns[0].state)
        if wanted.seal:
            answer.extend(state=await self._kept(self.conversations.seal, job.turns[0].state))

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request, time.monotonic() + self.settings.timeout)
        hosted = self._hosted(body)
        text = body.get("prompt", body.get("text"))
        if not isinstance(text, str):
            raise Refused("prompt is no text, expected text", param="prompt")
        ids = await anyio.to_thread.run_sync(lambda: hosted.model.tokenizer.encode(text))
        return _json({"tokens": ids, "count": len(ids)})

    async def _body(self, request: Request, deadline: float) -> Any:
        return await read_body(request, self._most, self.settings.patience, deadline)

    def _hosted(self, body: Any) -> Hosted:
        """The model that a body names."""
        name = body.get("model") if isinstance(body, dict) else None
        if not isinstance(name, str):
            raise Refused("model is missing or no text, expected the name of a model", param="model")
        return self._named(name)

    def _named(self, name: str) -> Hosted:
        if name not in self.models:
            raise Refused(
                f"there is no model {name[:100]!r}, expected one of {', '.join(self.models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    # What is told about the server.

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [about(hosted) for hosted in self.models.values()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"].rstrip("/")  # some clients end an address with a slash
        return _json(about(self._named(name))) if name else await self._models(request)

    async def _openapi(self, request: Request) -> Response:
        return _json(document(self.models))

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        for hosted in self.models.values():
            hosted.require_ready()
        return _json({"status": "ready"})


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(value), status, headers, media_type="application/json")


async def _broken(request: Request, error: Exception) -> Response:
    """A fault of ours; the log has the traceback."""
    return _json(Refused("the server failed; its log says how", status=500).body, 500)
