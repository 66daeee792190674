"""A state on a device: whatever interrupts a copy, the numbers are somewhere, whole."""

import numpy as np
import pytest

from dijiang.runtime.sessions.resident import Resident
from dijiang.runtime.state import State
from tests.models.test_spec import PYTHIA_410M, spec


class Memory:
    """A buffer; the write number `fails` is interrupted."""

    writes, fails = 0, None

    def __init__(self, shape):
        self.held = np.full(shape, -7.0, np.float32)

    def write(self, array):
        Memory.writes += 1
        if Memory.writes == Memory.fails:
            raise KeyboardInterrupt
        self.held[:] = array

    def read(self, array):
        array[:] = self.held


@pytest.fixture
def state():
    found = State.empty(1, spec(PYTHIA_410M | {"num_hidden_layers": 3}), "f" * 64)
    for index, layer in enumerate(found.layers):
        layer[:] = index + 1
    return found


def numbers(state):
    return [set(layer.ravel()) for layer in state.layers]


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_interrupted_upload_leaves_the_state_as_it_was(state, fails, monkeypatch):
    monkeypatch.setattr(Memory, "writes", 0)
    monkeypatch.setattr(Memory, "fails", fails)
    sets = tuple([Memory(shape) for shape in state.shapes] for _ in range(2))
    resident = Resident(sets)
    with pytest.raises(KeyboardInterrupt):
        resident.take(state)
    assert numbers(state) == [{1.0}, {2.0}, {3.0}]
    assert resident.take(state) == 0
    assert [set(buffer.held.ravel()) for buffer in sets[0]] == [{1.0}, {2.0}, {3.0}]
    assert numbers(state) == [{1.0}, {2.0}, {3.0}]
