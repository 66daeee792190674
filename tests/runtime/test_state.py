"""A state: whose it is, where it is, and what becomes of it when somebody presses Ctrl-C."""

import json
import signal
import struct
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dijiang
from dijiang.recipe import GRAPHS
from tests.conftest import GOLDEN, RUNNABLE

TOKENS = 12


@pytest.fixture(scope="module")
def model(exported):
    return dijiang.load(exported("tiny-python"))


def advanced(model, ids=(1, 2, 3)):
    state = model.new_state()
    model.forward([list(ids)], state)
    return state


def bits(state):
    return [layer.tobytes() for layer in state.layers]


# Whose it is.


def test_state_runs_with_every_bundle_of_its_checkpoint(model, exported):
    other = dijiang.load(exported("tiny-python", precision="int8"))
    state = advanced(model)
    assert other.forward([[4]], state).shape == (1, model.spec.vocab_size)
    assert state.position.tolist() == [4]


@pytest.mark.parametrize("options", [{}, {"decay": "analytic"}])
def test_state_of_another_checkpoint_of_the_same_shape_is_refused_and_untouched(model, exported, options):
    other = dijiang.load(exported("tiny-python-published", **options))
    state = advanced(model)
    before = bits(state)
    with pytest.raises(dijiang.InputError, match=r"the state is of checkpoint \w+, expected \w+; use the bundle"):
        other.forward([[4]], state)
    with pytest.raises(dijiang.InputError, match="the state is of checkpoint"):
        other.generate([4], state=state)
    assert (bits(state), state.position.tolist()) == (before, [3])


def test_state_in_use_by_a_generation_is_refused(model):
    state = model.new_state()
    first = model.generate([1, 2], max_tokens=5, state=state)
    second = model.generate([1, 2], max_tokens=5, state=state)  # neither has begun
    next(first)
    for use in (
        lambda: next(second),
        lambda: model.forward([[3]], state),
        lambda: model.generate([3], state=state),
    ):
        with pytest.raises(dijiang.InputError, match="in use by a generation that has not ended"):
            use()
    assert state.position.tolist() == [2]
    assert len(list(first)) == 4
    next(model.generate([3], state=state))  # dropped: nobody uses it any more
    model.forward([[3]], state)


def test_closed_generation_gives_its_state_back(model):
    state = model.new_state()
    records = model.generate([1, 2], max_tokens=5, state=state)
    next(records)
    records.close()
    model.forward([[3]], state)


# In a file.


@pytest.fixture
def saved(model, tmp_path):
    state = model.new_state(2)
    model.forward([[1, 2, 3], [4, 5, 6]], state)
    state.save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_saved_state_goes_on_where_it_was(model, saved):
    restored = dijiang.State.load(saved)
    state = model.new_state(2)
    model.forward([[1, 2, 3], [4, 5, 6]], state)
    assert restored.position.tolist() == [3, 3]
    assert (restored.seen == state.seen).all()
    assert (restored.last == state.last).all()
    ids = [[7, 8], [9, 10]]
    np.testing.assert_array_equal(model.forward(ids, restored), model.forward(ids, state))


@pytest.mark.parametrize("graph", RUNNABLE)
def test_saved_state_has_the_same_size_at_any_position(exported, tmp_path, graph):
    model, sizes = dijiang.load(exported("tiny-python", graph=graph)), []
    state = model.new_state()
    for length in (1, 300, 700):
        model.forward([list(range(length))], state)
        state.save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size)
    # Only the digits of numbers in its header differ.
    assert max(sizes) - min(sizes) < 16
    assert sizes[0] < state.nbytes + model.spec.vocab_size // 8 + 4096


def edited(saved, words=None, **changes):
    """The file with other tensors (None: without one) and other words in its metadata."""
    with saved.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        metadata = json.loads(stream.read(length))["__metadata__"]
    tensors = load_file(saved) | {name: value for name, value in changes.items() if value is not None}
    kept = {name: value for name, value in tensors.items() if name not in changes or changes[name] is not None}
    save_file(kept, saved, metadata | (words or {}))
    return saved


def layer(saved):
    return load_file(saved)["layer.0"]


#: What is wrong -> (how it is made, what is said).
DAMAGED = {
    "position of rank 0": (lambda s: edited(s, position=np.array(3)), "position is int64 of rank 0"),
    "position of another dtype": (
        lambda s: edited(s, position=np.array([3, 3], np.int8)),
        "position is int8 of rank 1",
    ),
    "negative position": (lambda s: edited(s, position=np.array([3, -1])), "positions, last ids or seen ids out"),
    "no position": (lambda s: edited(s, position=None), "'position'"),
    "layer in float64": (lambda s: edited(s, **{"layer.0": layer(s).astype(np.float64)}), "layer 0 is float64"),
    "layer of another shape": (lambda s: edited(s, **{"layer.0": layer(s)[:, :1]}), "layer 1 is float32"),
    "last layer of another shape": (lambda s: edited(s, **{"layer.5": layer(s)[:, :1]}), "layer 5 is float32"),
    "layer with NaN": (lambda s: edited(s, **{"layer.0": layer(s) * np.float32(np.nan)}), "layer 0 holds NaN"),
    "missing layer": (lambda s: edited(s, **{"layer.3": None}), "'layer.3'"),
    "unknown tensor": (lambda s: edited(s, other=np.zeros(3)), "'layer.6'"),
    "last id out of range": (lambda s: edited(s, last=np.full((2, 64), 10**9)), "a last id outside"),
    "last id of no token": (lambda s: edited(s, last=np.full((2, 64), -2)), "a last id outside"),
    "too few last ids": (lambda s: edited(s, last=np.full((2, 63), 1)), "positions, last ids or seen ids out"),
    "seen of another size": (lambda s: edited(s, seen=np.zeros((2, 3), np.uint8)), "seen ids out of range"),
    "a history of another size": (lambda s: edited(s, history=np.zeros((2, 31), np.uint8)), "a history of another"),
    "another number": (lambda s: edited(s, position=np.array([3, 4])), "not what its digest says"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_state_file_is_one_error(saved, case):
    damage, said = DAMAGED[case]
    damage(saved)
    with pytest.raises(dijiang.InputError, match=rf"not a saved state \(.*{said}.*\); save it again"):
        dijiang.State.load(saved)


#: Of one sequence: the token that waits, its place, how far a text is open, what is held back, counts.
SEAM = [5, 3, 0, "", [[7, 2]]]


@pytest.mark.parametrize(
    ("seams", "said"),
    [
        ([SEAM, SEAM], "not what its digest says"),  # nothing else is wrong with it
        ([SEAM], "seams of another number of sequences"),
        ({"0": SEAM, "1": SEAM}, "seams of another number of sequences"),
        ([SEAM, SEAM[:4]], "not enough values"),
        *[
            ([None, [*SEAM[:at], value, *SEAM[at + 1 :]]], f"a seam {said}")
            for at, value, said in [
                (0, 5.0, "of the wrong types"),
                (0, True, "of the wrong types"),
                (3, None, "of the wrong types"),
                (4, [[7.0, 2]], "of the wrong types"),
                (0, -1, "out of range"),
                (0, 10**6, "out of range"),
                (4, [[-1, 2]], "out of range"),
                (4, [[10**6, 2]], "out of range"),
                (1, -1, "out of range"),
                (2, -1, "out of range"),
                (2, 65, "out of range"),
                (4, [[7, 0]], "with counts out of range"),
                (4, [[7, 2**32]], "with counts out of range"),
            ]
        ],
    ],
)
def test_seams_that_no_state_has_are_one_error(saved, seams, said):
    edited(saved, words={"seams": json.dumps(seams)})
    with pytest.raises(dijiang.InputError, match=rf"not a saved state \(.*{said}.*\); save it again"):
        dijiang.State.load(saved)


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], [{}]], ids=str)
def test_note_is_flat(saved, value):
    """It is shown, whoever wrote it: what is nested could be nested for ever."""
    edited(saved, words={"note": json.dumps({"made": {}, "sampler": {"stop": value}, "top": []})})
    with pytest.raises(dijiang.InputError, match=r"not a saved state \(a note of the wrong types\)"):
        dijiang.State.load(saved)


def test_state_of_another_vocabulary_is_refused(model):
    state = model.new_state()
    other = dijiang.State(state.layers, state.position, state.fingerprint, state.vocab_size + 8)
    with pytest.raises(dijiang.InputError, match=r"a vocabulary of \d+, expected \d+; use new_state"):
        model.forward([[1]], other)


@pytest.mark.parametrize("damage", ["text", "cut", "missing", "folder", "empty", "npz", "checkpoint"])
def test_file_that_is_no_state_is_one_error(model, saved, tmp_path, damage):
    path = tmp_path / "no-state"
    if damage == "text":
        path.write_text("not a state, but some text that is long enough")
    elif damage == "cut":
        path.write_bytes(saved.read_bytes()[:-20])
    elif damage == "folder":
        path.mkdir()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "npz":
        with path.open("wb") as stream:
            np.savez(stream, position=np.zeros(1), layer_0=np.zeros(3))
    elif damage == "checkpoint":
        path = GOLDEN["neox-base"] / "model.safetensors"
    with pytest.raises(dijiang.InputError, match="save it again"):
        dijiang.State.load(path)


def test_state_of_a_later_version_is_refused(saved):
    data = saved.read_bytes()
    saved.write_bytes(data.replace(b'"version":"3"', b'"version":"9"'))
    with pytest.raises(dijiang.InputError, match="dijiang-state version 9, expected dijiang-state version 3"):
        dijiang.State.load(saved)


def test_failed_save_keeps_the_file_that_was_there(model, saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(dijiang.InputError, match="No space left on device"):
        advanced(model).save(saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


# Ctrl-C.


class Interrupted(BaseException):  # as KeyboardInterrupt is
    pass


@pytest.fixture
def timer():
    """timer(seconds): SIGALRM raises after that time, wherever Python is."""

    def interrupt(number, frame):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def seconds_of(work):
    """How long something takes here, once it is warm: signals come meanwhile."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def consistent(state, snapshots):
    """Whether layers and position are of the same token."""
    return bits(state) == snapshots[int(state.position[0])]


@pytest.mark.parametrize("graph", RUNNABLE)
def test_signal_at_any_moment_leaves_layers_and_position_of_the_same_token(exported, timer, graph):
    model = dijiang.load(exported("tiny-python", graph=graph), threads=1)
    ids = np.arange(TOKENS) + 5
    state, snapshots = model.new_state(), {0: bits(model.new_state())}
    for token in ids:
        model.forward([[token]], state)
        snapshots[int(state.position[0])] = bits(state)

    def run(state):
        for token in ids:
            model.forward([[token]], state)

    random, cut, longest = np.random.default_rng(0), 0, seconds_of(lambda: run(model.new_state()))
    for _ in range(200):
        state = model.new_state()
        try:
            timer(random.uniform(1e-5, longest))
            run(state)
            timer(0)
        except Interrupted:
            cut += 0 < state.position[0] < TOKENS
        assert consistent(state, snapshots)
        rest = ids[int(state.position[0]) :]  # and it goes on from there
        for token in rest[:2]:
            model.forward([[token]], state)
        assert consistent(state, snapshots)
    assert cut > 20


def test_signal_during_a_generation_leaves_a_state_that_goes_on(exported, timer):
    model = dijiang.load(exported("tiny-python"), threads=1)
    whole = [record.token for record in model.generate([7, 8, 9], max_tokens=40)]

    def run(state):
        for _ in model.generate([7, 8, 9], max_tokens=40, state=state):
            pass

    random, cut, longest = np.random.default_rng(1), 0, seconds_of(lambda: run(model.new_state()))
    for _ in range(50):
        state = model.new_state()
        try:
            timer(random.uniform(1e-4, longest))
            run(state)
            timer(0)
        except Interrupted:
            cut += 1
        fed = int(state.position[0])
        if fed < 3:
            continue
        twin = model.new_state()
        model.forward([[7, 8, 9, *whole[: fed - 3]]], twin)
        for found, expected in zip(state.layers, twin.layers, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert state.seam() is None or state.seam().token == whole[fed - 3]
    assert cut > 20


@pytest.mark.parametrize("graph", RUNNABLE)
def test_failed_step_leaves_no_state_that_is_half_written(exported, monkeypatch, graph):
    """Where the step writes over the state, nothing goes on from it; else it is as it was before."""
    model = dijiang.load(exported("tiny-python", graph=graph))
    state = advanced(model)
    kept = state.clone()

    def fail(io):
        raise RuntimeError("out of memory")

    session = model.session._session
    monkeypatch.setattr(model.session, "_session", type("Broken", (), {"run_with_iobinding": staticmethod(fail)})())
    monkeypatch.setattr(type(model.session._session), "io_binding", session.io_binding, raising=False)
    with pytest.raises(dijiang.SessionError, match="failed in a step of 1 tokens"):
        model.forward([[4]], state)
    monkeypatch.undo()
    expected = model.forward([[4]], kept)
    if GRAPHS[graph].in_place:
        with pytest.raises(dijiang.InputError, match="the state was lost in a step that failed"):
            model.forward([[4]], state)
    else:
        np.testing.assert_array_equal(model.forward([[4]], state), expected)
    with pytest.raises(dijiang.InputError, match="out of range"):
        model.forward([[10**6]], kept)


def test_take_gives_sequences_in_any_order(model):
    state = model.new_state(3)
    model.forward([[1, 2, 3], [4, 5, 6], [7, 8, 9]], state, mask=[[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    taken = state.take(np.array([2, 0, 0, 1]))
    assert taken.position.tolist() == [1, 3, 3, 2]
    for found, layer in zip(taken.layers, state.layers, strict=True):
        np.testing.assert_array_equal(found, layer[[2, 0, 0, 1]])
        assert found.flags.c_contiguous
        assert not np.shares_memory(found, layer)
    np.testing.assert_array_equal(taken.seen, state.seen[[2, 0, 0, 1]])
    found = model.forward([[5]] * 4, taken)
    np.testing.assert_allclose(found, model.forward([[5]] * 3, state)[[2, 0, 0, 1]], atol=2e-5)
    assert state.position.tolist() == [4, 3, 2]


def test_take_keeps_what_a_generation_left(model):
    state = model.new_state()
    list(model.generate([1, 2], max_tokens=3, state=state))
    fork = state.take([0, 0]).take([1])
    expected = [record.token for record in model.generate(max_tokens=3, state=state)]
    assert [record.token for record in model.generate(max_tokens=3, state=fork)] == expected


@pytest.mark.parametrize("rows", [[], [2], [-1], [0.5], [[0]], ["a"], [True]])
def test_take_refuses_what_are_no_rows(model, rows):
    state = model.new_state(2)
    with pytest.raises(dijiang.InputError, match=r"^rows "):
        state.take(rows)


def test_one_of_several_threads_advances_a_state(model):
    state, refused = model.new_state(), []

    def advance():
        for _ in range(60):
            try:
                model.forward([[1, 2, 3]], state)
            except dijiang.InputError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=advance) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = 3 * 60 - len(refused)
    assert state.position.tolist() == [3 * taken]
    assert all("the state is in use" in reason for reason in refused)
    alone = model.new_state()
    for _ in range(taken):
        model.forward([[1, 2, 3]], alone)
    assert all(np.array_equal(*pair) for pair in zip(state.layers, alone.layers, strict=True))
