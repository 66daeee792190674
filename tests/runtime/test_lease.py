"""A state has one user at a time."""

import threading
import time
from contextlib import suppress

from dijiang.errors import InputError
from dijiang.runtime.lease import Lease


def test_one_of_two_threads_gets_a_lease(monkeypatch):
    lease, got, require = Lease(), [], Lease.require_free

    def slow(self, user=None):
        require(self, user)
        time.sleep(0.05)

    def take():
        with suppress(InputError), lease.held():
            got.append(time.sleep(0.2))

    monkeypatch.setattr(Lease, "require_free", slow)
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
