"""The kernels of the cuda graph compile for every generation of GPUs: that needs NVIDIA's compiler, and no GPU."""

import platform
import sys

import pytest

import dijiang
from dijiang.runtime.sessions import kernels

HERE = sys.platform == "linux" and platform.machine() == "x86_64"
#: Turing, Ampere, Jetson Orin, Ada, Hopper, Blackwell, Jetson Thor and desktops of its generation.
GENERATIONS = ["sm75", "sm80", "sm87", "sm89", "sm90", "sm100", "sm110", "sm120"]

pytestmark = pytest.mark.skipif(not HERE, reason="NVIDIA's compiler is installed on Linux on x86-64")


def test_nothing_is_missing_to_compile_them():
    assert kernels.why_no_kernels() == ""


@pytest.mark.parametrize("sm", GENERATIONS)
def test_kernels_compile(sm):
    image = kernels.compile_kernels(kernels._source().read_bytes(), sm)
    assert image[:4] == b"\x7fELF"
    for name in ("features", "recur", "decode", "mix", "add_norm"):
        assert all(f"{name}{suffix}".encode() in image for suffix in ("_fp32", "_fp16", "_bf16"))
    assert b"angles_fp32" in image


@pytest.mark.parametrize(
    ("source", "sm", "said"),
    [(b"static __device__ float x = 1 +;", "sm90", "expected an expression"), (b"", "sm10", "architecture")],
)
def test_what_does_not_compile_is_one_line(source, sm, said):
    with pytest.raises(
        dijiang.SessionError, match=rf"NVRTC does not compile the kernels for {sm} \(.*{said}.*graph ort$"
    ):
        kernels.compile_kernels(source, sm)
