"""What can be wrong with a GPU, from the command line: one line with the next step, never the CPU."""

import shutil
import sys
from types import SimpleNamespace

import onnxruntime
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.cli import main
from dijiang.runtime.operators import find_library
from dijiang.runtime.sessions import preflight
from tests.conftest import EXAMPLES
from tests.fake_gpu import FakeLibcuda, fake_tensorrt

TINY = EXAMPLES / "tiny-python"


class Machine:
    """A machine whose GPU, driver, TensorRT and onnxruntime-gpu are all right; tests break one."""

    def __init__(self, monkeypatch, folder):
        self.patch, self.folder = monkeypatch, folder
        self.cuda = FakeLibcuda(sm="86", name=b"Fake RTX")
        self.cuda.driver = 13000
        monkeypatch.setattr("dijiang.machine.driver.load_library", lambda: self.cuda)
        # The operators' library asks the system's libcuda.
        monkeypatch.setattr("dijiang.runtime.sessions.device_session.load_kernels", lambda index: None)
        monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*GPU_PROVIDERS, CPU])
        self.trt = self.install_tensorrt(fake_tensorrt(self.cuda))

    def install_tensorrt(self, module):
        self.patch.setitem(sys.modules, "tensorrt", module)
        return module

    def no_driver(self):
        self.patch.undo()
        self.patch.setattr("dijiang.machine.driver.LIBRARY", "libnothing.so.1")
        self.patch.setattr(onnxruntime, "get_available_providers", lambda: [*GPU_PROVIDERS, CPU])
        self.install_tensorrt(fake_tensorrt(self.cuda))

    def old_driver(self):
        self.cuda.driver = 12060

    def driver_of_another_kernel(self):
        self.cuda.cuInit = lambda flags: 803

    def null_builder(self):
        self.trt.fails.add("builder")

    def full(self):
        self.cuda.free = 1 << 20

    def onnxruntime_says(self, text):
        def fail(*args, **kwargs):
            raise RuntimeError(text)

        self.patch.setattr(onnxruntime, "InferenceSession", fail)

    def fills_up(self):
        self.onnxruntime_says("Failed to allocate memory for requested buffer of size 1234\n")

    def fills_up_while_running(self):
        self.patch.setattr(self.cuda, "cuMemAlloc_v2", lambda address, size: 2)

    def other_gpu(self):
        self.cuda.sm, self.cuda.name = "89", b"Other RTX"

    def other_version(self):
        self.trt.__version__ = "10.16.1"

    def stub(self):
        self.install_tensorrt(SimpleNamespace())

    def no_tensorrt(self):
        self.install_tensorrt(None)

    def no_tensorrt_libraries(self):
        (self.folder / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open')\n")
        self.patch.syspath_prepend(self.folder)
        self.patch.delitem(sys.modules, "tensorrt")

    def library_lacks(self, name):
        def load(ort, provider):
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

        self.patch.setattr(preflight, "load_provider_library", load)

    def no_cuda_libraries(self):
        self.library_lacks("libcublasLt.so.13")

    def no_libraries_for_onnxruntimes_tensorrt(self):
        self.library_lacks("libnvinfer.so.10")

    def no_cuda_provider(self):
        self.patch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])

    def swaps_provider(self):
        create, options = onnxruntime.InferenceSession, onnxruntime.SessionOptions()
        if library := find_library():
            options.register_custom_ops_library(str(library))
        self.patch.setattr(
            onnxruntime,
            "InferenceSession",
            lambda path, sess_options, providers, enable_fallback: create(path, options),
        )

    def two_onnxruntimes(self):
        for name in ("onnxruntime", "onnxruntime_gpu"):
            info = self.folder / f"{name}-1.31.1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: 1.31.1\n")
        self.patch.syspath_prepend(self.folder)
        self.no_cuda_provider()  # the one that was installed last


CPU = "CPUExecutionProvider"
GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
CUDA = ["run", "{bundle}", "-p", "x", "-n", "2", "--provider", "cuda"]
ORT_TRT = [*CUDA[:-1], "ort-tensorrt"]
TRT = ["run", "{engine}", "-p", "x", "-n", "2", "--provider", "tensorrt"]
AUTO = [*CUDA[:-1], "auto"]
BUILD = ["build", "{engine}", "--backend", "tensorrt"]
BUILD_RTX = ["build", "{engine}", "--backend", "tensorrt_rtx"]
VERIFY = ["verify", "{bundle}", "--against", str(TINY), "--provider", "cuda"]

#: What is wrong -> commands, and what their one line has: what was found, what was expected, what to do.
BAD = {
    "no_driver": (
        (CUDA, ORT_TRT, TRT, BUILD, BUILD_RTX, VERIFY),
        ("no NVIDIA driver", "libnothing.so.1 was not found", "install the driver"),
    ),
    "old_driver": (
        (CUDA, ORT_TRT, VERIFY, AUTO),
        ("driver supports CUDA 12.6", "built with CUDA 13.0", "install a newer NVIDIA driver"),
    ),
    "driver_of_another_kernel": (
        (CUDA, ORT_TRT, TRT, BUILD, VERIFY),
        ("cuInit: CUDA error 803", "check nvidia-smi, and the driver against the CUDA version"),
    ),
    "null_builder": ((BUILD,), ("could not start", "its CUDA version is not newer than the driver's")),
    "full": (
        (CUDA, ORT_TRT, TRT, VERIFY, AUTO),
        ("GB of GPU memory, 0.00 GB are free", "use a smaller model, precision or batch"),
    ),
    "fills_up": (
        (CUDA, ORT_TRT, VERIFY),
        ("cannot load it (Failed to allocate memory", "use a smaller model, precision or batch"),
    ),
    "fills_up_while_running": ((TRT,), ("error 2 (out of memory)", "use a smaller model, precision")),
    "other_gpu": (
        (TRT,),
        ("10.3.0 for sm86", "here is 10.3.0 on Other RTX (sm89)", "rebuild with: dijiang build"),
    ),
    "other_version": (
        (TRT,),
        ("built with TensorRT 10.3.0", "here is 10.16.1", "rebuild with: dijiang build"),
    ),
    "stub": ((TRT, BUILD), ("here without TensorRT's libraries", "pip install 'dijiang[tensorrt]'")),
    "no_tensorrt": ((TRT, BUILD), ("TensorRT is not installed", "pip install 'dijiang[tensorrt]'")),
    "no_tensorrt_libraries": (
        (TRT, BUILD),
        ("without TensorRT's libraries (libnvinfer.so.10", "pip install 'dijiang[tensorrt]'"),
    ),
    "no_cuda_libraries": (
        (CUDA, VERIFY, AUTO),
        (
            "cannot load its cuda provider (libcublasLt.so.13",
            "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        ),
    ),
    "no_libraries_for_onnxruntimes_tensorrt": (
        (ORT_TRT,),
        ("cannot load its tensorrt provider (libnvinfer.so.10", "pip install 'dijiang[tensorrt]'"),
    ),
    "no_cuda_provider": (
        (CUDA, ORT_TRT, VERIFY),
        ("is not available", "has CPUExecutionProvider", "pip install 'dijiang[gpu]'"),
    ),
    "swaps_provider": (
        (CUDA, VERIFY, AUTO),
        ("asked for CUDAExecutionProvider, onnxruntime used CPUExecutionProvider", "pip install"),
    ),
    "two_onnxruntimes": (
        (CUDA, ORT_TRT, VERIFY, AUTO),
        (
            "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed",
            "pip uninstall -y onnxruntime onnxruntime-gpu",
        ),
    ),
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def bundles(exported, tmp_path_factory):
    """A bundle for CUDA, and one with an engine of a GPU that is not there."""
    engine = tmp_path_factory.mktemp("engine") / "b"
    shutil.copytree(exported("tiny-python", graph="primitive"), engine)
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, engine)
        dijiang.build(engine, backend="tensorrt")
    return {"bundle": exported("tiny-python"), "engine": engine}


@pytest.mark.parametrize(
    ("wrong", "command"),
    [(wrong, command) for wrong, (commands, _) in BAD.items() for command in commands],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}-{value[-1]}",
)
def test_what_is_wrong_with_a_gpu_is_one_line_and_exit_1(machine, bundles, wrong, command):
    getattr(machine, wrong)()
    done = CliRunner().invoke(main, [part.format(**bundles) for part in command])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("Error: ")
    for words in BAD[wrong][1]:
        assert words in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_bench_on_a_provider_that_is_not_there_measures_nothing(bundles):
    """Its tests run in processes of their own: nothing of this one is patched there."""
    command = ["bench", bundles["bundle"], "--provider", "ort-tensorrt-rtx", "-p", "none", "-n", "2"]
    done = CliRunner().invoke(main, [str(part) for part in [*command, "-r", 1, "--seconds", 0]])
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: 0 tests were measured, 1 were not")
    assert "is not available" in last
    assert "Traceback" not in done.stderr


def test_nothing_wrong_runs_on_the_engine(machine, bundles):
    done = CliRunner().invoke(main, [part.format(**bundles) for part in TRT])
    assert done.exit_code == 0
