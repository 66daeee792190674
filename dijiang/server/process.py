"""The server as a process: models loaded, a socket, an orderly end."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..batching.slots import slot_bytes
from ..environment import SEAL_KEY
from ..errors import InputError
from ..hub import name_of
from ..runtime.model import Model, load
from ..runtime.sessions.providers import Say
from .app import Server, log
from .connections import patient_protocol
from .conversations import sealed_bytes
from .descriptors import Scarce, raise_descriptors
from .hosted import Hosted
from .logs import logged
from .settings import Serving

#: Characters of a seal's key, at least.
KEY_LENGTH = 32


def build(
    models: dict[str, Model], settings: Serving, *, api_key: str | None = None, seal_key: str | None = None
) -> Server:
    """The server of loaded models, by name; InputError if it would not be safe."""
    settings.require_safe(api_key)
    if seal_key is not None and len(seal_key) < KEY_LENGTH:
        raise InputError(f"{SEAL_KEY} has {len(seal_key)} characters, expected {KEY_LENGTH} or more")
    largest = max(len(model.new_state().snapshot().dump()) for model in models.values())
    settings.require_room(largest)
    hosted = [Hosted(name, model, settings) for name, model in models.items()]
    seal = None if seal_key is None else seal_key.encode("utf-8", "surrogateescape")
    return Server(hosted, settings, api_key=api_key, seal_key=seal, largest_state=2 * sealed_bytes(largest))


def loaded(bundles: Sequence[Path], loading: dict[str, Any], say: Say = lambda text: None) -> dict[str, Model]:
    """Models by their names, see `hub.name_of`; InputError: two bundles of one name."""
    models: dict[str, Model] = {}
    for bundle in bundles:
        name = name_of(bundle)
        if name in models:
            raise InputError(f"two bundles have the name {name}, expected one of each; rename a folder")
        models[name] = load(bundle, say=say, **loading)
    return models


def serve(
    bundles: Sequence[Path],
    settings: Serving,
    loading: dict[str, Any],
    *,
    api_key: str | None,
    seal_key: str | None,
    say: Say,
    logs: bool,
) -> None:
    """Load bundles and serve them until SIGTERM, SIGHUP or Ctrl-C; answers that have begun are finished first.

    Raises:
        SystemExit: with 130 for Ctrl-C, else 143, where a second signal has cut answers.
        InputError: two bundles of one name, or the address cannot be used.
    """
    settings.require_safe(api_key)
    server = build(loaded(bundles, loading, say), settings, api_key=api_key, seal_key=seal_key)
    for hosted in server.models.values():
        one = hosted.model.spec.state_bytes / 1e6
        say(
            f"{hosted.name}: {hosted.slots} slots in {hosted.slots * slot_bytes(hosted.model) / 1e6:,.1f} MB; "
            f"a state has {one:,.1f} MB at any length; at most {settings.prefix_memory:,} MB of beginnings and "
            f"{settings.conversations * one:,.1f} MB of conversations beside"
        )
    raise_descriptors()
    asyncios = logging.getLogger("asyncio")
    asyncios.setLevel(logging.ERROR)  # it warns of each client that went
    asyncios.addFilter(Scarce())
    log.setLevel(logging.INFO if logs else logging.WARNING)
    with _listening(settings) as listening, logged() as lines:
        server.metrics.log_lines_lost = lambda: lines.lost
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"a page for browsers: {address}/")
        say(f"listening on {address}/v1")
        config = uvicorn.Config(
            server.app(),
            http=patient_protocol(settings.patience, server.metrics.ended),
            timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # it need not be whole
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.timeout) + 1,
        )
        logging.getLogger("uvicorn.error").addFilter(_is_fault)
        ending = _Ending(config, server)
        ending.run(sockets=[listening])
    if ending.cut is not None:
        raise SystemExit(128 + ending.cut)


class _Ending(uvicorn.Server):
    """Ends when begun answers are finished; at the second signal they end with an error, at the third it ends."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server, self._asked = server, 0
        #: The signal that cut answers.
        self.cut: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn, which takes a second Ctrl-C for the third, and a second SIGTERM for nothing."""
        self._asked += 1
        if self._asked == 1:
            self.should_exit = True
            # What is waited for may take longer than the system waits for us.
            self._begin(self._server.conversations.flush)
        elif self._asked == 2:
            self.cut = sig
            self._begin(self._server.cancel)
        else:
            self.force_exit = True

    def _begin(self, work: Callable[[], None]) -> None:
        """In a thread: this one may hold the lock that it takes."""
        threading.Thread(target=work, name="ending", daemon=True).start()


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether uvicorn logs something else than a task that was cancelled at the end."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)


def _listening(settings: Serving) -> socket.socket:
    """A socket that listens; InputError if the address cannot be used. `::` is every address, of IPv4, too."""
    host = settings.address
    try:
        family = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        made = socket.create_server((host, settings.port), family=family, backlog=1024, dualstack_ipv6=both)
        # Connections have it from here: asyncio sets it only on sockets that name their protocol. Without it what
        # follows a head waits 40 ms for the client to say that it has that.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host is so long
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{settings.host}:{settings.port} cannot be listened on ({reason}); choose another address or port"
        ) from error
