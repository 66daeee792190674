"""Who takes turns with whom, and the processes that they take turns in."""

import os
import threading
from types import SimpleNamespace

import pytest

from dijiang.bench import measure, subject
from dijiang.bench.matrix import Test
from dijiang.bench.measure import Effort, Run, needed_bytes, rounds
from dijiang.bench.results import result_of
from dijiang.bench.subject import Side, Subject, Traffic, bundle_side, load_bundle
from dijiang.bench.worker import Worker
from dijiang.bundle.opened import open_bundle
from dijiang.errors import BenchError
from dijiang.machine.sensors import Meter
from tests.machine.test_describe import SHARED

STEPS, ENDLESS = Test("tg", 3), Test("tg", 10**9)


def test_depths_take_turns_in_one_process(exported):
    sides = [bundle_side(n, open_bundle(exported("tiny-python"))) for n in ("first", "second")]
    order = []

    class Recorded(Run):
        def _repeat(self, worker, side, test):
            order.append((worker._process.pid, side.name, test.depth))
            super()._repeat(worker, side, test)

    run = Recorded(Effort(2, 0.0), "cpu", [], print)
    run.series(sides, [Test("tg", 2, depth) for depth in (0, 9)])
    assert [turn[1:] for turn in order] == 2 * [(n, d) for d in (0, 9) for n in ("first", "second")]
    assert len({pid for pid, *_ in order}) == 2
    assert all(one.interleaved and not one.alone for one in run.samples.values())


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
    with Worker(bundle_side("one", open_bundle(exported("tiny-python"))), "auto", [STEPS]) as worker:
        assert worker.start()[1] == "CPUExecutionProvider"
        worker._process.kill()
        worker._process.join()  # its end of the pipe is closed before it is asked
        with pytest.raises(BenchError, match="want of memory"):
            ask(worker)


def test_a_process_that_is_killed_while_it_works_is_one_line(exported):
    with Worker(bundle_side("one", open_bundle(exported("tiny-python"))), "auto", [ENDLESS]) as worker:
        worker.start()
        killer = threading.Timer(0.2, worker._process.kill)
        killer.start()
        with pytest.raises(BenchError, match="want of memory"):
            worker.repeat(ENDLESS)
        killer.join()


@pytest.mark.parametrize(
    ("waited", "turns", "disturbed"),
    [
        ([0.01, 0.02], [0, 1], []),
        ([0.2, 0.01, 0.02], [0, 1], [0]),  # taken again
        ([0.2, 0.3, 0.4, 0.01], [1], [0, 0, 0]),  # given up after three
    ],
    ids=["quiet", "again", "left out"],
)
def test_what_other_processes_disturbed_is_taken_again(exported, monkeypatch, waited, turns, disturbed):
    shares = iter(waited)

    class Busy:
        def seen(self):
            return next(shares), 0.0

    monkeypatch.setattr(measure, "Watch", Busy)
    monkeypatch.setattr(measure, "wait_until_idle", lambda seconds: None)
    side, test = bundle_side("one", open_bundle(exported("tiny-python"))), Test("tg", 2)
    run = Run(Effort(2, 0.0, quiet=True, probe=False), "cpu", [], print)
    run.series([side], [test])
    samples = run.samples["one", test]
    assert [turn.number for turn in samples.turns] == turns
    assert [turn.number for turn in samples.disturbed] == disturbed
    assert samples.peaks["host"] > 0
    assert next(shares, None) is None
    assert [measured["turn"] for _, measured in run.bandwidths] == [0, 1]


def test_peak_of_a_gpu_that_shows_no_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(subject, "load_nvml", lambda: SHARED)
    assert subject._device_bytes() is None


def test_peak_of_a_gpu_that_does_not_show_this_process_is_unknown(monkeypatch):
    """As in a container: its number is another one there."""
    shown = [SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=7)]
    nvml = {"nvmlDeviceGetCount": lambda: 1, "nvmlDeviceGetHandleByIndex": lambda index: index}
    nvml |= {"nvmlDeviceGetComputeRunningProcesses": lambda _: shown}
    monkeypatch.setattr(subject, "load_nvml", lambda: SimpleNamespace(**nvml))
    assert subject._device_bytes() is None
    shown.append(SimpleNamespace(pid=os.getpid(), usedGpuMemory=5))
    assert subject._device_bytes() == 5


def test_minutes_end_a_series_after_a_turn(exported):
    side, test = bundle_side("one", open_bundle(exported("tiny-python"))), Test("tg", 2)
    run = Run(Effort(50, 0.0, minutes=0.0, probe=False), "cpu", [], print)
    run.series([side], [test])
    assert len(run.samples["one", test].turns) == 1


def clocked(path, threads, provider):
    return Clocked()


class Clocked(Subject):
    """A program with a clock of its own, which gives totals only."""

    provider, warm = "a program", 0

    def prepare(self, tests):
        pass

    def warm_up(self, test):
        self.warm += 1

    def seconds(self, test):
        return [float(self.warm)]

    def peaks(self):
        return {"host": None, "device": 7}


def test_a_subject_with_its_own_clock_gives_totals():
    side, test = Side("peer", "", clocked, Traffic(0), {}), Test("tg", 4)
    run = Run(Effort(2, 0.0, probe=False), "cpu", [], print)
    run.series([side], [test])
    samples = run.samples["peer", test]
    assert [turn.seconds for turn in samples.turns] == [[1.0], [1.0]]
    found = result_of(side, test, samples, 1e9, Meter([]))
    assert (found["per_token"], found["tpot_s"], found["roofline"]) == (None, 0.25, None)
    assert found["decode"]["memory"]["max_ram"] is None
