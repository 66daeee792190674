"""The compiled operator asked by many threads at once, its first choice of an instruction set too."""

import ctypes
import threading

import numpy as np

from dijiang.runtime.operators import find_library, gptq, isa, isa_names, open_library

barrier, failed = threading.Barrier(8), []


def ask(seed):
    random = np.random.default_rng(seed)
    library, floats = open_library(find_library()), ctypes.POINTER(ctypes.c_float)
    a, b, c, out = (random.standard_normal(4096).astype(np.float32) for _ in range(4))
    barrier.wait()
    for _ in range(20):
        assert isa() in isa_names()
        library.dijiang_multiply_add(*(x.ctypes.data_as(floats) for x in (a, b, c, out)), len(a))
        np.testing.assert_allclose(out, a.astype(np.float64) * b + c, rtol=1e-5, atol=1e-5)
        codes, _ = gptq(a.reshape(64, 64).copy(), np.eye(64, dtype=np.float32), np.ones(64, np.float32), 8, 32)
        assert codes.shape == (64, 2, 32)


def guarded(seed):
    try:
        ask(seed)
    except BaseException as error:
        failed.append(error)


threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
print("8 threads, no race reported")
