"""How many generations a server runs at once."""

from types import SimpleNamespace

from dijiang.batching import slots


def test_a_slot_is_a_row_and_a_state_of_its_own_in_half_of_the_memory(monkeypatch):
    spec = SimpleNamespace(state_bytes=900, vocab_size=100)
    monkeypatch.setattr(slots, "available_bytes", lambda: 4 * 5 * 1000)
    assert slots.slots_that_fit(SimpleNamespace(spec=spec)) == 5
