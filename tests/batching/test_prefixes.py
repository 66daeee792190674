"""What prompts share is fed once, and nothing else changes."""

import errno
import hashlib
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

import dijiang
from dijiang.batching.batcher import Batcher
from dijiang.batching.prefixes import CHUNK, Prefixes, packed, worth_keeping
from dijiang.batching.turn import Turn
from dijiang.errors import InputError
from dijiang.hidden import hidden_name, locked
from dijiang.runtime import state_folder
from dijiang.runtime.generate import prepare
from dijiang.runtime.options import Generation
from dijiang.runtime.state_folder import RELISTED, StateFolder
from tests.batching.test_batcher import Told, result
from tests.conftest import RUNNABLE

OPTIONS = {"max_tokens": 5, "ignore_eos": True, "repetition_penalty": 1.2}
MB = 1 << 20


@pytest.fixture(scope="module", params=["int8", "int4"])
def model(request, exported):
    if "native" not in RUNNABLE:
        pytest.skip("no compiled operator")
    return dijiang.load(exported("tiny-python", precision=request.param, graph="native"), threads=1)


def answered(model, prefixes, prompt, state=None, budget=None):
    """A turn that has ended."""
    state = model.new_state() if state is None else state
    plan = prepare(model, prompt, Generation.of(OPTIONS), state, keeps=False)
    turn = Turn(plan, state, Told(), keeps=True, borders=prefixes.borders(state, plan.ids))
    batcher = Batcher(model, 2, budget, prefixes)
    batcher.submit(turn)
    while batcher.step():
        pass
    return turn


def same(turn, model, prompt):
    """Whether a turn is what its prompt alone gives, bit for bit."""
    state = model.new_state()
    expected = result(list(model.generate(prompt, state=state, **OPTIONS)))
    return (turn.listener.result[0], [a.tobytes() for a in turn.state.layers], turn.state.history.tobytes()) == (
        expected[0],
        [a.tobytes() for a in state.layers],
        state.history.tobytes(),
    )


def prompts(shared, count=4):
    random = np.random.default_rng(shared)
    head = random.integers(0, 2048, shared).tolist()
    return [head + random.integers(0, 2048, random.integers(1, 50)).tolist() for _ in range(count)]


@pytest.mark.parametrize("shared", [1, CHUNK - 1, CHUNK, CHUNK + 1, 200, 400])
def test_hits_are_recomputation_bit_for_bit(model, tmp_path, shared):
    prefixes, fed = Prefixes(model, 64 * MB, StateFolder(tmp_path, 64 * MB)), []
    for prompt in prompts(shared):
        turn = answered(model, prefixes, prompt, budget=48)
        assert same(turn, model, prompt)
        fed.append(len(prompt) - turn.reused)
    prefixes.close()
    if shared >= CHUNK:
        assert max(fed[1:]) <= 50 + 2 * CHUNK
        assert fed[0] >= shared
        other = Prefixes(model, 64 * MB, StateFolder(tmp_path, 64 * MB))  # another process
        turn = answered(model, other, prompt)
        assert turn.reused > 0
        assert same(turn, model, prompt)
        other.close()


def test_same_document_is_not_fed_again(model):
    prefixes, document = Prefixes(model, 64 * MB), prompts(450, 1)[0]
    answered(model, prefixes, [*document, 1])
    turn = answered(model, prefixes, [*document, 2])
    assert len(turn.plan.ids) - turn.reused <= CHUNK + 1
    assert same(turn, model, [*document, 2])


def test_what_continues_one_state_is_shared_too(model):
    prefixes, prompt = Prefixes(model, 64 * MB), prompts(230, 1)[0]
    for turns in range(2):
        state = model.new_state()
        model.forward([prompt[:70]], state)
        turn = answered(model, prefixes, prompt[70:], state)
        assert same(turn, model, prompt)
        assert bool(turn.reused) is bool(turns)
    state = model.new_state()
    model.forward([[*prompt[:69], 1]], state)
    assert answered(model, prefixes, prompt[70:], state).reused == 0  # the same ids after others


def test_memory_and_disk_are_bounded_and_the_last_used_stay(model, tmp_path):
    size = model.spec.state_bytes + model.spec.vocab_size
    prefixes = Prefixes(model, 3 * size, StateFolder(tmp_path, 3 * (size + 8192)))
    for number in range(12):
        answered(model, prefixes, [number + 1] * (CHUNK + 1))
        assert len(prefixes._kept) <= 3
        while prefixes._folder._waiting:  # what comes faster than a disk writes is not kept
            time.sleep(0.001)
    prefixes.close()
    assert 1 <= len(list(tmp_path.iterdir())) <= 3
    last = answered(model, Prefixes(model, 3 * size, StateFolder(tmp_path, MB)), [12] * (CHUNK + 1))
    assert last.reused == CHUNK


def named(word):
    """A name as beginnings have one."""
    return hashlib.sha256(word.encode()).hexdigest()


def test_newest_of_one_moment_stays(model, tmp_path, monkeypatch):
    """The clocks of file systems have ticks of some ms."""
    monkeypatch.setattr(state_folder, "_age", lambda file: 0.0)
    folder, state = StateFolder(tmp_path, model.spec.state_bytes * 3 // 2), model.new_state()
    for word in ("b", "a"):
        folder.save(named(word), state)
    assert [file.stem for file in tmp_path.iterdir()] == [named("a")]


def test_what_a_killed_process_had_not_finished_goes_at_the_next_start(model, tmp_path):
    StateFolder(tmp_path, MB).save(named("whole"), model.new_state())
    dead, mine = tmp_path / hidden_name("dead.state"), tmp_path / "notes.txt"
    dead.write_bytes(b"half")
    mine.write_bytes(b"mine")
    writing = tmp_path / hidden_name("writing.state")
    writing.write_bytes(b"half")
    with locked(writing):
        folder = StateFolder(tmp_path, MB)
        assert {file.name for file in tmp_path.iterdir()} == {f"{named('whole')}.state", "notes.txt", writing.name}
    assert folder.load(named("whole")) is not None


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="choose another folder"):
        StateFolder(tmp_path / "file" / "states", MB)


def test_damaged_or_foreign_files_are_fed_again(model, exported, tmp_path):
    prompt = [7] * (CHUNK + 3)
    prefixes = Prefixes(model, 64 * MB, StateFolder(tmp_path, 64 * MB))
    answered(model, prefixes, prompt)
    prefixes.close()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    foreign = dijiang.load(exported("tiny-python-published"))
    other = foreign.new_state()
    foreign.forward([[7] * CHUNK], other)
    elsewhere = StateFolder(tmp_path.parent / f"{tmp_path.name}-other", MB)
    elsewhere.save(named("other"), model.new_state())
    renamed = (tmp_path.parent / f"{tmp_path.name}-other" / f"{named('other')}.state").read_bytes()
    for damage in (data[:-7], data[:3000] + b"xyz" + data[3003:], b"", other.snapshot().dump(), renamed):
        file.write_bytes(damage)
        again = Prefixes(model, 64 * MB, StateFolder(tmp_path, 64 * MB))
        turn = answered(model, again, prompt)
        again.close()
        assert turn.reused == 0
        assert same(turn, model, prompt)
        anew = answered(model, Prefixes(model, 64 * MB, StateFolder(tmp_path, 64 * MB)), prompt)
        assert anew.reused == CHUNK  # it was written again


def test_kept_borders_are_few_and_near_what_is_shared():
    assert worth_keeping({}) == frozenset()
    for count in range(1, 200):
        kept = worth_keeping({CHUNK * n: "" for n in range(1, count + 1)})
        assert CHUNK * count in kept
        assert len(kept) <= count.bit_length() + 1
        for shared in range(1, count + 1):
            found = max((at for at in kept if at <= CHUNK * shared), default=0)
            assert CHUNK * shared - found <= CHUNK * max(count - shared - 1, 0) or found == 0


def test_files_from_before_a_clock_went_back_make_room_first(model, tmp_path):
    state = model.new_state()
    folder, ahead = StateFolder(tmp_path, 64 * MB), time.time() + 3_600
    for word in ("one", "two"):
        folder.save(named(word), state)
        os.utime(tmp_path / f"{named(word)}.state", (ahead, ahead))
    size = (tmp_path / f"{named('one')}.state").stat().st_size
    StateFolder(tmp_path, 2 * size + 1_000).save(named("new"), state)
    assert folder.load(named("new")) is not None
    assert len(list(tmp_path.glob("*.state"))) == 2


def test_disk_that_is_away_for_a_while_loses_nothing(model, tmp_path, monkeypatch):
    folder = StateFolder(tmp_path, 64 * MB)
    folder.save(named("kept"), model.new_state())

    def away(path, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", away)
        assert folder.load(named("kept")) is None
    assert folder.load(named("kept")) is not None


def test_state_of_another_version_stays_for_it(model, tmp_path):
    folder = StateFolder(tmp_path, 64 * MB)
    folder.save(named("kept"), model.new_state())
    (file,) = tmp_path.iterdir()
    mine = file.read_bytes()
    file.write_bytes(mine.replace(b'"version":"3"', b'"version":"4"'))
    assert file.read_bytes() != mine
    newer = file.read_bytes()
    assert folder.load(named("kept")) is None
    assert file.read_bytes() == newer
    file.write_bytes(mine)
    assert folder.load(named("kept")) is not None


def test_what_cannot_be_written_is_said_once_and_counted(model, tmp_path, monkeypatch, caplog):
    folder, state = StateFolder(tmp_path / "states", 64 * MB), model.new_state()

    def full(*arguments):
        raise InputError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dijiang.runtime.snapshot.Snapshot.save", full)
        assert [folder.save(named(word), state) for word in "abc"] == [False] * 3
    assert folder.lost == 3
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'states'}: states cannot be kept (No space left on device); those are lost until they can be"
    ]
    (tmp_path / "states").rmdir()  # by somebody else: it is made again
    assert folder.save(named("d"), state)
    assert folder.load(named("d")) is not None
    assert folder.lost == 3


def test_a_save_costs_the_same_whatever_the_folder_holds(model, tmp_path, monkeypatch):
    state, listed, glob = model.new_state(), [], Path.glob

    def counted(path, pattern):
        listed.append(path)
        return glob(path, pattern)

    StateFolder(tmp_path, MB).save(named("size"), state)
    size = (tmp_path / f"{named('size')}.state").stat().st_size
    folder = StateFolder(tmp_path, 50 * size)
    monkeypatch.setattr(Path, "glob", counted)
    for number in range(250):
        folder.save(named(f"s{number}"), state)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 50 * size
    assert len(listed) <= 250 / 4
    assert folder.load(named("s249")) is not None


def test_what_others_write_into_a_folder_counts(model, tmp_path):
    state = model.new_state()
    StateFolder(tmp_path, MB).save(named("size"), state)
    size = (tmp_path / f"{named('size')}.state").stat().st_size
    folders = [StateFolder(tmp_path, 20 * size) for _ in range(3)]
    for number in range(3 * 2 * RELISTED):
        folders[number % 3].save(named(f"s{number}"), state)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1.5 * 20 * size


@pytest.mark.parametrize("full", [False, True])
def test_packed_state_is_a_copy_in_memory_of_its_own(model, monkeypatch, full):
    def none(*arguments, **options):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    if full:
        monkeypatch.setattr(mmap, "mmap", none)
    state, direct = model.new_state(), model.new_state()
    for one in (state, direct):
        model.forward([[5, 6, 7]], one)
    copy = packed(state)
    expected = model.forward([[8]], state)
    for one in (copy.clone(), copy.clone()):  # nobody changes the copy
        assert np.array_equal(model.forward([[8]], one), expected)
    assert np.array_equal(copy.seen, direct.seen)
    assert np.array_equal(copy.history, direct.history)
    assert all(map(np.array_equal, copy.layers, direct.layers))


def test_what_is_not_ours_in_a_folder_is_neither_counted_nor_removed(model, tmp_path):
    """Somebody's own states, links and folders; their names may be asked for, too."""
    state = model.new_state()
    state.snapshot().save(tmp_path / "precious.state")
    before = (tmp_path / "precious.state").read_bytes()
    (tmp_path / "old.state").mkdir()
    (tmp_path / "dangling.state").symlink_to(tmp_path / "nothing")
    (tmp_path / f"{named('link')}.state").symlink_to(tmp_path / "nothing")
    (tmp_path / f"{named('folder')}.state").mkdir()
    renamed = tmp_path / f"{named('mine')}.state"
    renamed.write_bytes(before)
    folder = StateFolder(tmp_path, 4 * len(before))
    assert [folder.load(name) for name in ("precious", "old", "dangling", named("mine"))] == [None] * 4
    assert renamed.read_bytes() == before
    for number in range(40):
        assert folder.save(named(f"s{number}"), state)
    others = {"precious.state", "old.state", "dangling.state", f"{named('link')}.state", f"{named('folder')}.state"}
    left = {file.name: file for file in tmp_path.iterdir()}
    assert others <= left.keys()
    assert (tmp_path / "precious.state").read_bytes() == before
    ours = [file.stat().st_size for name, file in left.items() if name not in others]
    assert 1 <= len(ours) <= 4
    assert sum(ours) <= 4 * len(before)


def test_state_that_cannot_be_removed_is_said(model, tmp_path, monkeypatch, caplog):
    state = model.new_state()
    folder = StateFolder(tmp_path, 2 * model.spec.state_bytes)
    monkeypatch.setattr(Path, "unlink", refuse)
    for number in range(4):
        assert folder.save(named(f"s{number}"), state)
    (said,) = [record.message for record in caplog.records]  # once
    assert said.startswith(f"{tmp_path}: states cannot be removed ([Errno 1] Operation not permitted)")


def refuse(path, **options):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
