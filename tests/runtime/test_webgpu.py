"""What is around the WebGPU provider: choice, refusals, a device that is lost. Its kernels: `make gpu`."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

import dijiang
from dijiang.doctor.support import support
from dijiang.recipe import PRECISIONS, PROVIDERS
from dijiang.runtime.sessions import copies, device, providers, webgpu
from dijiang.runtime.sessions.preflight import explain
from tests import fake_ort
from tests.conftest import RUNNABLE
from tests.runtime.test_cuda import GATE, STAND_IN

pytestmark = pytest.mark.skipif("webgpu" not in RUNNABLE, reason="onnxruntime is older than 1.30")
GPU, CPU = onnxruntime.OrtHardwareDeviceType.GPU, onnxruntime.OrtHardwareDeviceType.CPU


@pytest.fixture(autouse=True)
def afresh():
    """What was found out about the plug-in is forgotten."""
    webgpu._registered.cache_clear()
    yield
    webgpu._registered.cache_clear()


@pytest.fixture
def plugin(monkeypatch):
    """plugin(*types): the plug-in is installed, and finds devices of these types."""

    def install(*types):
        monkeypatch.setattr(webgpu, "version", lambda package: "0.4.0")
        monkeypatch.setattr(
            webgpu, "import_module", lambda name: SimpleNamespace(get_library_path=lambda: "lib.so")
        )
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda name, path: None)
        found = [SimpleNamespace(ep_name="OtherProvider", device=SimpleNamespace(type=GPU))]
        found += [
            SimpleNamespace(ep_name="WebGpuExecutionProvider", device=SimpleNamespace(type=one)) for one in types
        ]
        monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: found)

    return install


@pytest.fixture
def stand_in(monkeypatch, plugin):
    """`webgpu` finds a GPU, and is the CPU's provider through the device's session."""
    plugin(GPU)
    fake_ort.install(monkeypatch)
    monkeypatch.setattr(webgpu, "WEBGPU", replace(STAND_IN, end=webgpu.WEBGPU.end, silent=webgpu.WEBGPU.silent))


# Refusals.


def refused(bundle, provider="webgpu"):
    with pytest.raises(dijiang.SessionError) as raised:
        dijiang.load(bundle, provider=provider)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_plugin_that_is_not_installed_is_named(exported, monkeypatch):
    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(webgpu, "version", absent)
    assert refused(exported("neox-base")) == (
        "onnxruntime-ep-webgpu is not installed; pip install 'dijiang[webgpu]' (Python 3.11 or newer)"
    )


@pytest.mark.parametrize(
    ("package", "words"),
    [("onnxruntime-ep-webgpu", "is 0.3, WebGPU needs 0.4"), ("onnxruntime", "is 1.29, WebGPU needs 1.30")],
)
def test_versions_that_are_too_old_are_refused_with_both_numbers(exported, monkeypatch, plugin, package, words):
    plugin(GPU)
    if package == webgpu.PACKAGE:
        monkeypatch.setattr(webgpu, "version", lambda package: "0.3.1")
    else:
        monkeypatch.setattr(onnxruntime, "__version__", "1.29.2")
    assert refused(exported("neox-base")) == f"{package} {words} or newer; pip install -U {package}"


def test_plugin_that_does_not_start_says_why(exported, monkeypatch, plugin):
    def fail(name, path):
        raise RuntimeError("undefined symbol: OrtGetApi\nand more")

    plugin(GPU)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", fail)
    found = refused(exported("neox-base"))
    assert found.startswith(
        f"onnxruntime-ep-webgpu 0.4 does not start beside onnxruntime {onnxruntime.__version__}"
    )
    assert "(undefined symbol: OrtGetApi); pip install -U onnxruntime onnxruntime-ep-webgpu" in found


def test_machine_without_a_gpu_says_how_to_allow_software(exported, plugin):
    plugin()
    found = refused(exported("neox-base"))
    assert "finds no GPU here; install its Vulkan driver" in found
    assert "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1" in found


def test_gpu_comes_before_software(plugin):
    plugin(CPU, GPU)
    assert webgpu.adapter().device.type == GPU
    assert webgpu.WEBGPU.title(0) == "WebGpuExecutionProvider"
    assert webgpu.WEBGPU.free(0) is None
    plugin(CPU)
    assert webgpu.WEBGPU.title(0) == "WebGpuExecutionProvider (in software)"
    assert webgpu.WEBGPU.free(0) > 0


def test_second_gpu_is_refused(exported):
    assert "it has no number; use webgpu" in refused(exported("neox-base"), "webgpu:1")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_types_that_it_does_not_run_are_refused_with_the_reason(exported, precision):
    found = refused(exported("neox-base", precision=precision))
    assert f"not on webgpu ({PROVIDERS['webgpu'].refused[precision]}); use --provider" in found
    assert "export again with --target onnxruntime --precision fp32" in found


def test_every_precision_that_a_provider_lacks_has_a_reason():
    found = list(support())
    assert len(found) == len(PROVIDERS) * len(PRECISIONS)
    assert all((one.target is None) == bool(one.why) == (not one.graphs) for one in found)
    assert [(one.provider, one.precision) for one in found if one.why] == [
        ("cpu", "bf16"),
        ("webgpu", "fp16"),
        ("webgpu", "bf16"),
    ]


def test_no_vulkan_driver_is_one_line():
    text = (
        "[ONNXRuntimeError] : 11 : EP_FAIL : a.cc:393 CreateProvider [ONNXRuntimeError] : 11 : EP_FAIL : b.cc:136 "
        "adapter.status == Success was false. Failed to get a WebGPU adapter: No supported adapters\n\nWarning"
    )
    found = str(explain(RuntimeError(text), "x"))
    assert found.startswith(
        "x (Failed to get a WebGPU adapter: No supported adapters Warning); install the GPU's Vulkan"
    )


# `auto`.


@pytest.mark.parametrize(
    ("types", "rates", "chosen", "said"),
    [
        (
            (GPU,),
            {"webgpu": 90.0, "native": 30.0},
            "webgpu",
            "auto: webgpu, for in a trial webgpu decodes 90 tokens/s",
        ),
        ((GPU,), {"webgpu": 30.0, "native": 90.0}, "native", "webgpu decodes 30 tokens/s, cpu 90"),
        ((GPU,), {"native": 90.0}, "native", "auto: cpu, for webgpu is not to be had: no device"),
        ((CPU,), {}, "native", None),
        ((), {}, "native", None),
    ],
    ids=["faster", "slower", "fails", "software", "none"],
)
def test_auto_takes_a_gpu_that_is_faster_and_says_so(
    exported, monkeypatch, stand_in, plugin, types, rates, chosen, said
):
    def rate(session, bundle):
        if session.graph not in rates:
            raise dijiang.SessionError("no device; use --provider cpu")
        return rates[session.graph]

    plugin(*types)
    monkeypatch.setattr("dijiang.machine.driver.LIBRARY", "libnothing.so")
    monkeypatch.setattr(providers, "decode_rate", rate)
    heard = []
    bundle = exported("neox-base")
    first = next(iter(dijiang.load(bundle, provider="cpu").manifest.graphs))
    rates |= {first: rates["native"]} if "native" in rates else {}
    model = dijiang.load(bundle, say=heard.append)
    assert model.graph == (first if chosen == "native" else chosen)
    assert len(heard) == (said is not None)
    assert not heard or said in heard[0]


def test_graph_that_only_the_cpu_runs_is_not_tried_elsewhere(exported, stand_in, monkeypatch):
    monkeypatch.setattr("dijiang.machine.driver.LIBRARY", "libnothing.so")
    heard = []
    assert dijiang.load(exported("neox-base"), graph="ort", say=heard.append).graph == "ort"
    assert heard == []


@pytest.mark.parametrize("name", ["neox-base", "neox-trained-decay"])
def test_trial_decodes_on_both(exported, stand_in, monkeypatch, name):
    monkeypatch.setattr("dijiang.machine.driver.LIBRARY", "libnothing.so")
    heard = []
    dijiang.load(exported(name), say=heard.append)
    assert len(heard) == 1
    assert "in a trial webgpu decodes" in heard[0]


# A device that fails.


def test_positions_that_its_arithmetic_does_not_reach_are_refused(exported, stand_in):
    model = dijiang.load(exported("neox-base"), provider="webgpu")
    state = model.new_state()
    state.position[:] = (1 << 31) - 1
    model.forward([[1]], state)
    kept = [layer.copy() for layer in state.layers]
    with pytest.raises(dijiang.SessionError, match="position 2147483648 is past 2147483647, the last that"):
        model.forward([[1]], state)
    assert state.position[0] == 1 << 31
    for layer, before in zip(state.layers, kept, strict=True):
        np.testing.assert_array_equal(layer, before)


@pytest.fixture
def lose(monkeypatch):
    """lose(numbers=...): from now on steps fail; with `numbers`, nothing can be read back either."""

    def now(*, numbers):
        def fail(*_):
            raise RuntimeError("WebGPU device lost (2): Device is lost.\nmore")

        patch = pytest.MonkeyPatch()
        patches.append(patch)
        patch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fail)
        if numbers:
            patch.setattr(onnxruntime.OrtValue, "numpy", fail)
        return patch

    patches = []
    yield now
    for patch in patches:
        patch.undo()


def test_state_is_whole_when_a_step_fails_and_the_device_still_answers(exported, stand_in, lose):
    model = dijiang.load(exported("neox-base"), provider="webgpu")
    cpu = dijiang.load(model.bundle.path, provider="cpu")
    states = [one.new_state() for one in (model, cpu)]
    for one, state in zip((model, cpu), states, strict=True):
        one.forward([[1, 2, 3]], state)
    patch = lose(numbers=False)
    with pytest.raises(
        dijiang.SessionError, match=r"failed in a step of 1 tokens .*load the bundle again"
    ) as raised:
        model.forward([[4]], states[0])
    assert "\n" not in str(raised.value)
    patch.undo()
    assert states[0].position[0] == 3
    found, expected = (one.forward([[4]], s) for one, s in zip((model, cpu), states, strict=True))
    np.testing.assert_allclose(found, expected, atol=GATE)


def test_state_is_refused_when_its_numbers_are_lost(exported, stand_in, lose, tmp_path):
    model = dijiang.load(exported("neox-base"), provider="webgpu")
    records = model.generate([1, 2, 3], state=(state := model.new_state()), max_tokens=20, ignore_eos=True)
    for _ in range(5):
        next(records)
    patch = lose(numbers=True)
    with pytest.raises(dijiang.SessionError, match="failed in a step of 1 tokens"):
        next(records)
    patch.undo()
    for use in (
        lambda: model.forward([[1]], state),
        state.clone,
        lambda: state.layers,
        lambda: state.save(tmp_path / "state"),
    ):
        with pytest.raises(dijiang.InputError, match="the state was lost in a step that failed") as raised:
            use()
        assert "\n" not in str(raised.value)
    assert model.forward([[1]], model.new_state()).shape == (1, model.spec.vocab_size)


def test_device_that_is_lost_between_steps_is_one_line(exported, stand_in, lose):
    model = dijiang.load(exported("neox-base"), provider="webgpu")
    model.forward([[1, 2, 3]], state := model.new_state())
    patch = lose(numbers=True)
    with pytest.raises(dijiang.SessionError, match="the device does not give its numbers back"):
        state.clone()
    patch.undo()
    assert state.clone().position[0] == 3  # nothing was lost after all


def test_memory_that_is_not_there_is_noticed(exported, stand_in, monkeypatch):
    model = dijiang.load(exported("neox-base"), provider="webgpu", cuda_graph=False)
    read = onnxruntime.OrtValue.numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", lambda self: read(self) * 0)
    state = model.new_state(2)
    with pytest.raises(dijiang.SessionError, match=r"the device has no memory for .* bytes more; use a smaller"):
        model.forward([[1], [2]], state)
    monkeypatch.undo()
    assert state.layers[0].shape[0] == 2


def test_batch_that_does_not_fit_is_refused_before_it_is_tried(exported, stand_in, monkeypatch):
    """A state lies on the device twice: what a step reads, and what it writes."""
    model = dijiang.load(exported("neox-base"), provider="webgpu")
    state, ids = model.new_state(50), np.ones((50, 1), np.int64)
    free = [2 * state.nbytes - 1]
    monkeypatch.setattr(device.Device, "free", lambda self, index: free[0])
    with pytest.raises(
        dijiang.SessionError, match=r"a state of batch 50: needs .* GB of GPU memory, 0.\d\d GB are"
    ):
        model.forward(ids, state)
    assert not state.position.any()
    free[0] += 1
    model.forward(ids, state)
    assert state.position.tolist() == [1] * 50


def test_bundle_that_does_not_fit_is_refused_before_it_is_loaded(exported, plugin, monkeypatch):
    plugin(CPU)
    monkeypatch.setattr(webgpu, "available_bytes", lambda: 1 << 20)
    found = refused(exported("neox-base"))
    assert "GB of GPU memory, 0.00 GB are free; use a smaller model, precision or batch" in found


# Bandwidth.


def test_stored_copy_is_the_nodes_that_it_is_said_to_be():
    graph = onnx.load(copies.COPY).graph
    assert [(node.op_type, *node.input, *node.output) for node in graph.node] == [
        ("Neg", "x", "y"),
        ("Gather", "y", "last", "z"),
    ]
    assert [onnx.numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer] == [[-1]]


def test_bandwidth_counts_what_its_copies_move(monkeypatch):
    fake_ort.install(monkeypatch)
    found = copies.device_bandwidth(STAND_IN, 0, 4096)
    assert (found.size, len(found.passes)) == (2 * 4096 * copies.COPIES, copies.PASSES)
    assert found.bytes_per_second == pytest.approx(found.size / np.median(found.passes))


def test_copies_that_come_out_wrong_are_no_bandwidth(monkeypatch):
    fake_ort.install(monkeypatch)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", lambda *_: None)
    with pytest.raises(dijiang.SessionError, match="copies 4,096 bytes wrongly"):
        copies.device_bandwidth(STAND_IN, 0, 4096)
