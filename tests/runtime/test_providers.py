"""How providers are chosen, and what is said where one is not to be had."""

import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import onnxruntime
import pytest

import dijiang
from dijiang.runtime.sessions import device as devices
from dijiang.runtime.sessions import providers
from dijiang.runtime.sessions.device import Device
from dijiang.runtime.sessions.preflight import check_single_onnxruntime, preload_libraries
from tests.conftest import RUNNABLE
from tests.fake_gpu import FakeLibcuda


@pytest.mark.parametrize("name", ["cuda", "ort-tensorrt", "ort-tensorrt-rtx"])
def test_provider_that_this_onnxruntime_lacks_is_refused(exported, name):
    with pytest.raises(dijiang.SessionError, match=r"ExecutionProvider is not available: onnxruntime .* has .*CPU"):
        dijiang.load(exported("neox-base"), provider=name)


def test_provider_that_onnxruntime_swapped_is_refused(exported, monkeypatch):
    device = Device("CUDAExecutionProvider", "install it", "", memory=None)
    monkeypatch.setattr(devices, "CUDA", device)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    create = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, sess_options, providers, enable_fallback: create(path, sess_options),
    )
    with pytest.raises(dijiang.SessionError, match=r"asked for CUDA.*, onnxruntime used CPU"):
        dijiang.load(exported("neox-base"), provider="cuda", graph="primitive")


@pytest.mark.parametrize("provider", ["tpu", "cuda:x", "cuda:", ":0", "auto:1", "cpu:0"])
def test_provider_that_does_not_exist_is_refused(exported, provider):
    with pytest.raises(dijiang.SessionError, match=rf"execution provider '{provider}'"):
        dijiang.load(exported("neox-base"), provider=provider)


@pytest.mark.skipif("onnx" not in RUNNABLE, reason="onnxruntime is older than 1.30")
def test_device_number_reaches_the_provider(exported, monkeypatch):
    seen = {}

    def record(path, sess_options, providers, enable_fallback):
        seen["providers"], seen["fallback"] = providers, enable_fallback
        seen["strict"] = sess_options.get_session_config_entry("session.disable_cpu_ep_fallback")
        raise RuntimeError("enough")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: seen.update(preloaded=True))
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    monkeypatch.setattr("dijiang.machine.driver.load_library", lambda: FakeLibcuda(count=3))
    with pytest.raises(dijiang.SessionError, match="enough"):
        dijiang.load(exported("neox-base", graph="onnx"), provider="cuda:2")
    ((name, settings),) = seen["providers"]
    assert name == "CUDAExecutionProvider"
    assert settings == {"device_id": "2", "enable_cuda_graph": "1", "use_tf32": "0"}
    assert (seen["fallback"], seen["strict"], seen["preloaded"]) == (0, "1", True)


def test_auto_is_the_cpu_without_a_driver_and_cuda_with_one(exported, monkeypatch):
    path = exported("neox-base")
    monkeypatch.setattr("dijiang.machine.driver.LIBRARY", "libnothing.so")
    model = dijiang.load(path)
    assert model.provider == "CPUExecutionProvider"
    monkeypatch.setattr("dijiang.machine.driver.load_library", FakeLibcuda)
    assert providers.parse(model.bundle, "auto") == ("cpu", 0)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert providers.parse(model.bundle, "auto") == ("cuda", 0)


def test_bfloat16_on_the_cpu_is_refused(exported):
    with pytest.raises(dijiang.SessionError, match=r"in bf16 runs on cuda, .*, not on cpu \(ONNX .*\); use"):
        dijiang.load(exported("neox-base", precision="bf16"), provider="cpu")


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_integers_that_were_not_written_for_cuda_are_refused(exported, target):
    path = exported("neox-base", target=target, precision="int8")
    with pytest.raises(
        dijiang.SessionError,
        match=r"in int8 runs on cpu.* not on cuda; use .*export again with --target cuda",
    ):
        dijiang.load(path, provider="cuda")


def test_cuda_graphs_on_the_cpu_are_refused(exported):
    with pytest.raises(dijiang.SessionError, match="the CPU has no CUDA graphs"):
        dijiang.load(exported("neox-base"), provider="cpu", cuda_graph=True)


def installed(tmp_path, **folders):
    """A `distribution` of importlib that knows packages by folder."""

    def find(name):
        folder = folders.get(name.replace("-", "_"))
        if folder is None:
            raise PackageNotFoundError(name)
        return SimpleNamespace(version="1.32.0", locate_file=(tmp_path / folder).joinpath)

    return find


@pytest.mark.parametrize("folders", [{"onnxruntime": "a"}, {"onnxruntime": "a", "onnxruntime_gpu": "b"}, {}])
def test_onnxruntime_packages_in_folders_of_their_own_are_taken(tmp_path, folders):
    check_single_onnxruntime(installed(tmp_path, **folders))


def test_both_onnxruntime_packages_in_one_folder_are_refused(tmp_path):
    with pytest.raises(dijiang.SessionError, match=r"both installed.*pip uninstall -y onnxruntime"):
        check_single_onnxruntime(installed(tmp_path, onnxruntime="a", onnxruntime_gpu="a"))


def test_cuda_libraries_are_found_beside_onnxruntime_and_elsewhere_without_a_word(tmp_path, monkeypatch, capsys):
    """As in a `pip install --target`: NVIDIA's packages stay where torch brought them."""
    for folder in ("there/nvidia/cu13/lib", "there/nvidia/cudnn/lib", "here/nvidia/cu13/lib"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "there")
    monkeypatch.syspath_prepend(tmp_path / "here")
    asked = []

    def preload_dlls(directory=None):
        print("Failed to load libcublas.so.13\nPlease follow")
        asked.append(directory)

    place = tmp_path / "here" / "onnxruntime" / "__init__.py"
    preload_libraries(SimpleNamespace(__file__=str(place), preload_dlls=preload_dlls))
    expected = [str(tmp_path / "there" / "nvidia" / name / "lib") for name in ("cu13", "cudnn")]
    # This environment may have a package of NVIDIA's, too.
    assert [one for one in asked if one is None or one.startswith(str(tmp_path))] == [None, *expected]
    assert capsys.readouterr().out == ""
    preload_libraries(SimpleNamespace())  # before 1.21


def test_this_environment_has_one_onnxruntime():
    check_single_onnxruntime()
    assert "onnxruntime" in sys.modules
