"""Constant memory and no drift: 100,000 tokens. Minutes long, run by `make soak`."""

import os
from pathlib import Path

import numpy as np
import pytest

import dijiang
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from tests import soak
from tests.conftest import EXAMPLES

TOKENS = 100_000
SETTLED = 1_000
MIB = 2**20
#: Positions from where the float64 recurrence is compared, at the end.
COMPARED = 200


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
def test_100_000_tokens_with_constant_memory_and_exact_logits(exported):
    model = dijiang.load(exported("tiny-python"))
    state, logits = model.new_state(), None
    ids = np.ones(TOKENS, np.int64)  # written, so that its pages are resident from the start
    random = np.random.default_rng(0)
    token, settled = 1, 0
    for position in range(TOKENS):
        ids[position] = token
        logits = model.forward(np.array([[token]]), state)
        # Top-8 draws: greedy text falls into a short loop and would test little.
        token = int(np.argpartition(logits[0], -8)[-8:][random.integers(8)])
        if position + 1 == SETTLED:
            settled = resident_bytes()
    grown = resident_bytes() - settled
    print(f"\nresident memory after {TOKENS:,} tokens: {grown / MIB:+.3f} MiB against {SETTLED:,}")
    assert grown < MIB

    reference = Reference(load_checkpoint(EXAMPLES / "tiny-python"))
    expected_state = reference.new_state(1)
    for start in range(0, TOKENS, COMPARED):
        expected = reference.forward(ids[None, start : start + COMPARED], start, expected_state)
    error = float(np.abs(logits[0] - expected[0, -1]).max())
    print(f"logits at token {TOKENS:,}: {error:.2e} from the float64 recurrence")
    assert error <= 1e-3


@pytest.mark.soak
def test_prompt_of_100_000_tokens_takes_the_memory_of_one_piece(exported, monkeypatch):
    """Resident memory after every piece of the prompt, against that after a short prompt."""
    model = dijiang.load(exported("tiny-python"))
    run, seen = model.session.run, []

    def watched(*arguments):
        logits = run(*arguments)
        seen.append(resident_bytes())
        return logits

    monkeypatch.setattr(model.session, "run", watched)
    ids = np.random.default_rng(0).integers(model.spec.vocab_size, size=(1, TOKENS))
    model.forward(ids[:, :SETTLED], model.new_state())
    settled = seen[-1]
    seen.clear()
    state = model.new_state()
    model.forward(ids, state)
    grown = max(seen) - settled
    print(f"\nresident memory in a prompt of {TOKENS:,}: {grown / MIB:+.3f} MiB against {SETTLED:,}")
    assert state.position[0] == TOKENS
    # Mask, positions and the like are 8 bytes a token each; a logit row a token would be 820 MB.
    assert grown < 8 * MIB


def life(**changes):
    """A report of a good life, with changes."""
    text = {"first": {"nats": 2.0, "different": 200.0}, "last": {"nats": 2.1, "different": 190.0}}
    logits = {"rms_relative_error": 1e-6, "rms_relative_error_of_a_fresh_state": 1e-6, "layers_finite": True}
    good = {"precision": "fp32", "resumed_equal": 9, "killed_and_resumed": 9, "logits": logits, "text": text}
    return good | {"memory": {"interval": [-0.5, 0.5]}} | changes


def test_faults_of_a_life_are_seen():
    assert soak.faults(life()) == []
    assert soak.faults(life(memory={"interval": [2.0, 3.0]})) == ["the memory grows"]
    assert soak.faults(life(resumed_equal=8)) == ["a resumed process said something else"]
    bad = life()["logits"] | {"rms_relative_error": 1e-3}
    assert soak.faults(life(logits=bad)) == ["the logits have drifted"]
    assert soak.faults(life(logits=bad | {"layers_finite": False}, precision="int8")) == [
        "the state is not finite",
        "the logits have drifted",
    ]
    dull = {"first": {"nats": 2.0, "different": 200.0}, "last": {"nats": 0.1, "different": 3.0}}
    assert soak.faults(life(text=dull)) == ["the text has changed"]


def test_slope_is_of_the_settled_part_of_each_piece():
    def piece(slope):
        return {"memory": [[at, 10**8 + slope * at] for at in range(1000, 90_000, 1000)]}

    found = soak.slope([piece(2.0), piece(3.0), {"memory": [[1000, 5]]}])
    assert found["pieces"] == 2
    np.testing.assert_allclose(found["bytes_a_token"], 2.5, rtol=1e-6)
    assert found["interval"][0] < 2 < 3 < found["interval"][1]
