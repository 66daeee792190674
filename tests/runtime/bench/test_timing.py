"""Claims about time, checked on an idle machine: `make timing`. Not part of `make test`."""

import shutil
import statistics
import subprocess
import time

import numpy as np
import pytest

import dijiang
from dijiang.models.initial import init
from dijiang.runtime.bench.bandwidth import BYTES, measure_bandwidth
from dijiang.runtime.bench.plan import Test
from dijiang.runtime.bench.runner import Options, load_bundle, run_bench
from dijiang.runtime.bench.timing import Timer

pytestmark = pytest.mark.timing

#: A STREAM-style read: every thread sums its part of an array. Prints bytes a second of each pass.
READ = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
typedef struct { const uint64_t *from; size_t count; uint64_t sum; } part;
static void *sum(void *p) {
  part *a = p;
  uint64_t total = 0;
  for (size_t i = 0; i < a->count; i++) total += a->from[i];
  a->sum = total;
  return 0;
}
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
int main(int argc, char **argv) {
  size_t bytes = strtoull(argv[1], 0, 10), threads = strtoull(argv[2], 0, 10);
  uint64_t *data = aligned_alloc(4096, bytes), check = 0;
  memset(data, 1, bytes);
  double best = 1e9;
  for (int pass = 0; pass < 10; pass++) {
    pthread_t ids[256];
    part parts[256];
    double start = now();
    for (size_t i = 0; i < threads; i++) {
      parts[i] = (part){data + i * (bytes / 8 / threads), bytes / 8 / threads, 0};
      pthread_create(ids + i, 0, sum, parts + i);
    }
    for (size_t i = 0; i < threads; i++) { pthread_join(ids[i], 0); check += parts[i].sum; }
    double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  printf("%f %llu\n", bytes / best, (unsigned long long)check);
  return 0;
}
"""


@pytest.fixture(scope="module")
def pythia_70m(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timing")
    init("pythia-70m", folder / "checkpoint")
    return dijiang.export(folder / "checkpoint", folder / "bundle", precision="int8", verify=False).path


@pytest.mark.parametrize("threads", [1, 2])
def test_bandwidth_is_within_a_tenth_of_a_compiled_read(tmp_path, threads):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    source, program = tmp_path / "read.c", tmp_path / "read"
    source.write_text(READ)
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
    ours, theirs = [], []
    for _ in range(5):  # in turn: a virtual machine's bandwidth drifts
        ours.append(measure_bandwidth(threads=threads).bytes_per_second)
        done = subprocess.run([program, str(BYTES), str(threads)], capture_output=True, check=True)
        theirs.append(float(done.stdout.split()[0]))
    print(f"\n{threads} threads: NumPy {max(ours) / 1e9:.1f} GB/s, C {max(theirs) / 1e9:.1f} GB/s")
    assert max(ours) > 0.9 * max(theirs)
    assert statistics.median(ours) > 0.9 * statistics.median(theirs)


def test_two_runs_agree_within_a_twentieth(pythia_70m):
    options = Options("none", "64", "512", repetitions=20, seconds=5.0)
    first, second = (run_bench([pythia_70m], options)["results"][0]["tpot_s"] for _ in range(2))
    print(f"\nTPOT {1e3 * first:.3f} and {1e3 * second:.3f} ms")
    assert abs(first - second) / first < 0.05


def test_the_bench_adds_less_than_a_hundredth_to_a_step(pythia_70m):
    """The timed loop against the same calls without clock, state reset or list."""
    subject = load_bundle(str(pythia_70m), None, "auto")
    timer = Timer(subject, Test("tg", 64, depth=512))
    ids = np.zeros((1, 1), np.int64)
    state = subject.at(1, 512, 576)
    bare, timed = [], []
    for _ in range(20):
        state.position[:] = 512
        started = time.perf_counter()
        for _ in range(64):
            ids[:, 0] = subject.model.forward(ids, state).argmax(axis=-1)
        bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        timer.repeat()
        timed.append(time.perf_counter() - started)
    overhead = statistics.median(timed) / statistics.median(bare) - 1
    print(f"\nstep {1e3 * statistics.median(bare) / 64:.3f} ms, overhead {overhead:+.2%}")
    assert overhead < 0.01
