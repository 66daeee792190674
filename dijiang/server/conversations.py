"""States between requests: kept here under an id, or sealed and sent to the client."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import math
import secrets
import threading
from collections import OrderedDict

from ..errors import InputError
from ..runtime.snapshot import Snapshot
from ..runtime.state import State
from ..runtime.state_folder import StateFolder
from .failures import Refused

log = logging.getLogger("dijiang.states")
#: How a sealed state begins: its format and version. The seal is over it, too.
HEAD = b"dijiang-sealed-1\n"
SEAL = hashlib.sha256
SEAL_BYTES = 32


class Conversations:
    """The last `most` states that were stored or continued. A state costs the same at any length.

    One call at a time, but for `flush`.

    Args:
        folder: takes those that leave the memory; None: they are forgotten.
        key: seals states. Servers with one key take each other's; None: a new one.
    """

    def __init__(self, most: int, key: bytes | None = None, folder: StateFolder | None = None) -> None:
        self._folder = folder
        self._most, self._key = most, key or secrets.token_bytes(SEAL_BYTES)
        self._kept: OrderedDict[str, State] = OrderedDict()
        self._lock = threading.Lock()
        #: What `flush` gave to the folder.
        self._flushed: set[str] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def store(self, name: str, state: State) -> None:
        """Keep a state; the one that was not used for longest makes room."""
        oldest = []
        with self._lock:
            self._kept[name] = state
            while len(self._kept) > self._most:
                oldest.append(self._kept.popitem(last=False))
        for each in oldest:
            if self._folder is not None and not self._folder.save_later(*each):
                self._folder.save(*each)

    @property
    def lost(self) -> int:
        """States that the folder could not take."""
        return 0 if self._folder is None else self._folder.lost

    def flush(self) -> None:
        """Put into the folder, if there is one, what is not there by now; a thread of the folder's writes it."""
        if self._folder is None:
            return
        with self._lock:  # to the last: `close` may come meanwhile
            for name in self._kept.keys() - self._flushed:
                self._folder.save_later(name, self._kept[name], most=math.inf)
            self._flushed |= self._kept.keys()

    def close(self) -> None:
        """Put all of them into the folder, if there is one."""
        self.flush()
        if self._folder is not None:
            self._folder.close()
            if self.lost:
                log.warning("%d conversations are lost: their folder could not take them", self.lost)

    def find(self, name: str) -> State:
        """A copy of a stored state, so that any answer can be continued more than once; Refused: not here."""
        with self._lock:
            state = self._kept.pop(name, None)
        if state is None and self._folder is not None:
            state = self._folder.load(name)
        if state is None:
            raise Refused(
                "previous_response_id names no stored answer: it was not stored, or is too old; send the whole "
                "conversation instead",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self.store(name, state)
        return state.clone()

    def seal(self, state: State) -> str:
        """A state as text that only a server with this key takes back."""
        data = state.snapshot().dump()
        return base64.b64encode(HEAD + self._mac(data) + data).decode()

    def open(self, sealed: str) -> State:
        """The state in a sealed text; Refused if it is none, was changed, or has another seal."""
        try:
            data = base64.b64decode(sealed, validate=True)
        except (binascii.Error, ValueError):
            raise Refused("state is not base64; send it as it was given", param="state") from None
        mac, inner = data[len(HEAD) : len(HEAD) + SEAL_BYTES], data[len(HEAD) + SEAL_BYTES :]
        if not data.startswith(HEAD) or not hmac.compare_digest(mac, self._mac(inner)):
            raise Refused(
                "state was not sealed by this server's key, or was changed; send it as it was given",
                param="state",
                code="invalid_state",
            )
        try:
            return State.of(Snapshot.parse(inner, "state"))
        except InputError as error:
            raise Refused(str(error), param="state", code="invalid_state") from None

    def _mac(self, data: bytes) -> bytes:
        return hmac.new(self._key, HEAD + data, SEAL).digest()


def sealed_bytes(snapshot: int) -> int:
    """Bytes of a sealed state, from those of its snapshot."""
    return 4 * (snapshot + len(HEAD) + SEAL_BYTES + 2) // 3
