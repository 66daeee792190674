"""Claims about time, checked on an idle machine: `make timing`. Not part of `make test`."""

import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import dijiang
from dijiang.bench.matrix import Test
from dijiang.bench.measure import Effort, Run
from dijiang.bench.subject import Subject, bundle_side, load_bundle
from dijiang.bundle.opened import open_bundle
from dijiang.machine.bandwidth import BYTES, PIECES, measure_bandwidth
from dijiang.machine.limits import usable_cores
from dijiang.models.initial import init

pytestmark = pytest.mark.timing

SOURCE = Path(__file__).with_name("read.c")
#: Decode steps of a repetition.
STEPS = 64


def in_turn(first, second, count):
    """Pairs of what both return; each goes first in half of them, as a virtual machine drifts."""
    pairs = []
    for turn in range(count):
        sides = (first, second) if turn % 2 else (second, first)
        found = [side() for side in sides]
        pairs.append(found if turn % 2 else found[::-1])
    return pairs


def seconds(action):
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def pythia_70m(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timing")
    init("pythia-70m", folder / "checkpoint")
    return dijiang.export(folder / "checkpoint", folder / "bundle", precision="int8", verify=False).path


@pytest.fixture(scope="module")
def compiled_read(tmp_path_factory):
    """compiled_read(threads): bytes a second of the best pass of a compiled STREAM-style read."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = tmp_path_factory.mktemp("read") / "read"
    options = ["-O3", "-march=native", "-funroll-loops", "-pthread"]
    subprocess.run([compiler, *options, SOURCE, "-o", program], check=True)

    def read(threads):
        command = [program, str(BYTES), str(threads), str(PIECES)]
        return float(subprocess.run(command, capture_output=True, check=True).stdout.split()[0])

    return read


@pytest.mark.parametrize("threads", range(1, usable_cores() + 1))
def test_bandwidth_is_within_a_tenth_of_a_compiled_read(compiled_read, threads):
    pairs = in_turn(lambda: measure_bandwidth(threads=threads).bytes_per_second, lambda: compiled_read(threads), 8)
    ours, theirs = (statistics.median(side) / 1e9 for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"\n{threads} threads: NumPy {ours:.1f} GB/s, C {theirs:.1f} GB/s, median ratio {ratio:.3f}")
    assert 0.9 < ratio < 1.1


def test_two_runs_agree_within_a_twentieth(pythia_70m):
    """Two runs of one test, each in a process of its own, repetition by repetition in turn.

    One after the other they differed by 7 % where the machine itself drifted by 30 %. Of two processes
    the one that was loaded first was 4 to 7 % slower on one machine, whichever had the first turn: so
    each run is loaded first half of the time, as both are where one follows the other.
    """
    bundle = open_bundle(pythia_70m)
    sides = [bundle_side(name, bundle) for name in ("first", "second")]
    test, totals = Test("tg", STEPS, depth=512), {"first": [], "second": []}
    for loaded in (sides, sides[::-1]) * 2:
        run = Run(Effort(20, 2.0), "cpu", [], lambda text: None)
        run.series(loaded, [test])
        assert run.failures == []
        for side in sides:
            totals[side.name] += run.samples[side.name, test].totals
    first, second = (statistics.median(found) / STEPS for found in totals.values())
    print(f"\nTPOT {1e3 * first:.3f} and {1e3 * second:.3f} ms")
    assert abs(first - second) / first < 0.05


class Instant(Subject):
    """A subject whose steps take no time: what is left is the bench itself."""

    provider = "none"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def at(self, batch, depth, end):
        return None

    def rewind(self, state, depth):
        pass

    def steps(self, tokens, state):
        while True:
            yield tokens


def test_the_bench_adds_less_than_a_hundredth_to_a_step(pythia_70m):
    """The timed loop against one without clock, rewind and list, on a subject that takes no time.

    The difference is microseconds: beside real steps it drowned in noise of 2 % either way.
    """
    real = load_bundle(str(pythia_70m), None, "auto")
    instant, test = Instant(real.vocab_size), Test("tg", STEPS, depth=512)
    tokens = np.zeros(1, np.int64)

    def bare():
        for _ in zip(instant.steps(tokens, None), range(STEPS), strict=False):
            pass

    instant.prepare([test])
    pairs = in_turn(lambda: seconds(bare), lambda: seconds(lambda: instant.seconds(test)), 200)
    added = statistics.median(timed - plain for plain, timed in pairs) / STEPS
    real.prepare([test])
    real.warm_up(test)
    step = min(min(real.seconds(test)) for _ in range(20))
    print(f"\nthe bench adds {1e6 * added:.2f} us to a step of {1e3 * step:.3f} ms: {added / step:.3%}")
    assert added < step / 100


def test_decode_rate_of_the_bench_is_that_of_run(pythia_70m):
    """Steps of the bench and of `generate`, in turn: within 3 %."""
    real, test = load_bundle(str(pythia_70m), None, "auto"), Test("tg", STEPS)
    real.prepare([test])
    real.warm_up(test)

    def run():
        *_, last = real.model.generate([1], max_tokens=STEPS + 1, ignore_eos=True)
        return 1 / last.decode_rate

    run()
    pairs = in_turn(lambda: sum(real.seconds(test)) / STEPS, run, 60)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print(f"\nbench over run: {ratio:.4f}")
    assert 0.97 < ratio < 1.03
