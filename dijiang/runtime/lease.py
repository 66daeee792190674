"""One at a time: who advances a state."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import ref

from ..errors import InputError

#: Held while a lease is taken, so that one of several threads gets it.
TAKING = threading.Lock()


class User:
    """Whoever has a lease."""


class Lease:
    """What one user has at a time. It ends with the user, too: a generator may be left behind."""

    def __init__(self) -> None:
        self._user: ref[object] | None = None

    def require_free(self, user: object = None) -> None:
        """InputError if somebody else has it."""
        using = None if self._user is None else self._user()
        if using is not None and using is not user:
            raise InputError(
                "the state is in use by a generation that has not ended; end or close that one, or give "
                "this one state.clone()"
            )

    @contextmanager
    def held(self) -> Iterator[object]:
        """For a block, which gets the user; InputError if somebody, maybe in another thread, has it."""
        user = User()
        with TAKING:
            self.require_free()
            self._user = ref(user)
        try:
            yield user
        finally:
            self._user = None
