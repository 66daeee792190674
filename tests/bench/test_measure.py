"""Who takes turns with whom, and the processes that they take turns in."""

import threading

import pytest

from dijiang.bench.matrix import Test
from dijiang.bench.measure import Effort, Series, needed_bytes, rounds
from dijiang.bench.subject import Side, bundle_side, load_bundle
from dijiang.bench.traffic import Traffic
from dijiang.bench.worker import Worker
from dijiang.bundle.manifest import open_bundle
from dijiang.errors import BenchError

STEPS, ENDLESS = Test("tg", 3), Test("tg", 10**9)


def test_depths_take_turns_in_one_process(exported):
    sides = [bundle_side(n, open_bundle(exported("tiny-python"))) for n in ("first", "second")]
    order = []

    class Recorded(Series):
        def _repeat(self, worker, side, test):
            order.append((worker._process.pid, side.name, test.depth))
            super()._repeat(worker, side, test)

    series = Recorded(
        sides, [Test("tg", 2, depth) for depth in (0, 9)], Effort(2, 0.0), "cpu", [], print
    )
    series.run()
    assert [turn[1:] for turn in order] == 2 * [(n, d) for d in (0, 9) for n in ("first", "second")]
    assert len({pid for pid, *_ in order}) == 2
    assert all(one.interleaved and not one.alone for one in series.samples.values())


def test_memory_decides_what_takes_turns():
    """All depths of both sides; or both sides of a depth; or one by one."""
    ours = Side("ours", "", load_bundle, Traffic(10**9, state=10**8), {})
    theirs = Side("theirs", "", load_bundle, Traffic(10**9, cache=10**6), {})
    shallow, deep = (Test("tg", 1, depth) for depth in (0, 1999))
    pairs = [(side, test) for test in (shallow, deep) for side in (ours, theirs)]
    # A side counts once, with the state of its deepest test.
    assert needed_bytes(pairs) == needed_bytes(pairs[2:])
    assert needed_bytes(pairs[2:]) - needed_bytes(pairs[:2]) == 1999 * 10**6
    assert rounds(pairs, needed_bytes(pairs)) == [pairs]
    split = rounds(pairs, needed_bytes(pairs) - 1)
    assert split == [pairs[:2], [pairs[2]], [pairs[3]]]


@pytest.mark.parametrize("ask", [lambda worker: worker.repeat(STEPS), Worker.finish])
def test_a_killed_process_is_one_line(exported, ask):
    with Worker(load_bundle, str(exported("tiny-python")), "auto", [STEPS]) as worker:
        assert worker.start()[1] == "CPUExecutionProvider"
        worker._process.kill()
        worker._process.join()  # its end of the pipe is closed before it is asked
        with pytest.raises(BenchError, match="want of memory"):
            ask(worker)


def test_a_process_that_is_killed_while_it_works_is_one_line(exported):
    with Worker(load_bundle, str(exported("tiny-python")), "auto", [ENDLESS]) as worker:
        worker.start()
        killer = threading.Timer(0.2, worker._process.kill)
        killer.start()
        with pytest.raises(BenchError, match="want of memory"):
            worker.repeat(ENDLESS)
        killer.join()
