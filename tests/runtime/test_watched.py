"""A state that others look at, copy and save while it is advanced."""

import copy
import pickle
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

import dijiang
from tests.conftest import RUNNABLE

TOKENS = 60


@contextmanager
def beside(work):
    """Another thread that works all the time."""
    ended, errors = threading.Event(), []

    def run():
        try:
            while not ended.is_set():
                work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert errors == []


def told(model, state, pace=0.0, **options):
    options = {"max_tokens": TOKENS, "ignore_eos": True} | options
    found = []
    for record in model.generate("def main(", state=state, **options):
        found.append(record.token)
        time.sleep(pace)  # the others have their turn
    return found


LOOKS = {
    "position": lambda state: state.position.copy(),
    "last": lambda state: state.last.copy(),
    "seen": lambda state: state.seen.sum(),
    "history": lambda state: state.history.copy(),
    "seam": lambda state: state.seam(),
    "layers": lambda state: [layer.shape for layer in state.layers],
}


@pytest.mark.parametrize("graph", RUNNABLE)
@pytest.mark.parametrize("look", LOOKS)
def test_a_look_changes_nothing(exported, graph, look):
    model = dijiang.load(exported("tiny-python", graph=graph), threads=1)
    expected, state = model.new_state(), model.new_state()
    tokens = told(model, expected)
    with beside(lambda: LOOKS[look](state)):
        assert told(model, state) == tokens
    assert state.position.tolist() == expected.position.tolist()
    assert np.array_equal(state.history, expected.history)
    assert np.array_equal(state.seen, expected.seen)
    assert all(map(np.array_equal, state.layers, expected.layers))


@pytest.mark.parametrize(("precision", "speculate"), [("fp32", False), ("int8", False), ("int8", True)])
def test_copies_of_another_thread_are_of_one_moment(exported, precision, speculate):
    if "native" not in RUNNABLE:
        pytest.skip("drafts need the native graph")
    model = dijiang.load(exported("tiny-python", precision=precision), threads=1)
    plain = model.new_state()
    tokens = told(model, plain)
    state, copies = model.new_state(), []
    prompt = model.tokenizer.encode("def main(")

    def clone():
        if int(state.position[0]) >= len(prompt) and len(copies) < 2000:
            copies.append(state.clone())

    with beside(clone):
        assert told(model, state, pace=0.001, speculate=speculate) == tokens
    assert np.array_equal(state.history, plain.history)
    fed, right, at = prompt + tokens, {}, model.new_state()
    for position, token in enumerate(fed[:-1]):
        model.forward([[token]], at)
        right[position + 1] = at.clone()
    assert copies
    for one in copies:
        same = right[int(one.position[0])]
        assert np.array_equal(one.history, same.history)
        assert max(np.abs(a - b).max() for a, b in zip(one.layers, same.layers, strict=True)) < 1e-4


def test_a_state_saved_by_another_thread_is_whole(exported, tmp_path):
    model = dijiang.load(exported("tiny-python", graph=RUNNABLE[0]), threads=1)
    state, files = model.new_state(), []

    def save():
        if len(files) < 40:
            state.save(tmp_path / f"{len(files)}.state")
            files.append(tmp_path / f"{len(files)}.state")

    with beside(save):
        told(model, state)
    for file in files:
        dijiang.State.load(file)


def test_a_generation_that_is_refused_breaks_none(exported):
    model = dijiang.load(exported("tiny-python", graph=RUNNABLE[0]), threads=1)
    expected, state = model.new_state(), model.new_state()
    tokens = told(model, expected)

    def refused():
        try:
            next(model.generate("x", state=state, max_tokens=1))
        except dijiang.InputError:
            return

    found = []
    records = model.generate("def main(", state=state, max_tokens=TOKENS, ignore_eos=True)
    found.append(next(records).token)
    with beside(refused):
        found += [record.token for record in records if len(found) < TOKENS]
    assert found[: len(tokens)] == tokens


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
@pytest.mark.parametrize("speculate", [False, True])
def test_copies_of_any_kind_are_clones(exported, copied, speculate):
    if "native" not in RUNNABLE:
        pytest.skip("drafts need the native graph")
    model = dijiang.load(exported("tiny-python", precision="int8"), threads=1)
    state, copies = model.new_state(), []
    for record in model.generate("def main(", state=state, max_tokens=20, ignore_eos=True, speculate=speculate):
        copies.append((copied(state), state.clone(), record))
    for one, clone, _ in copies:
        assert one.position.tolist() == clone.position.tolist()
        assert np.array_equal(one.history, clone.history)
        assert one.seam() == clone.seam()
        assert np.array_equal(model.forward([[5]], one), model.forward([[5]], clone))
