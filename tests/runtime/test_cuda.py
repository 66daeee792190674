"""The session with memory of its own, on the CPU in place of a GPU; and how providers are chosen."""

import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import dijiang
from dijiang.runtime import cuda, providers
from dijiang.runtime.providers import PROVIDERS, Provider, check_single_onnxruntime

from ..conftest import RUNNABLE, Golden
from .fake_gpu import FakeLibcuda

GATE = 1e-4
#: A provider with "graphs" and "device memory" that every machine has.
STAND_IN = Provider("CPUExecutionProvider", "nothing", memory="cpu", captures=True)


@pytest.fixture
def stand_in(monkeypatch):
    """`cuda` is the CPU's provider, through the device's session."""
    monkeypatch.setitem(PROVIDERS, "cuda", STAND_IN)


@pytest.fixture
def corrupting(monkeypatch):
    """Runs with a graph id other than -1 come out wrong, as after a swapped buffer."""
    run = onnxruntime.InferenceSession.run_with_iobinding

    def spoilt(self, io, options=None):
        run(self, io, options)
        if options is not None and options.get_run_config_entry("gpu_graph_id") != "-1":
            for output in io.get_outputs():
                output.update_inplace(output.numpy() * 2)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", spoilt)


@pytest.mark.parametrize("dialect", RUNNABLE)
@pytest.mark.parametrize("name", ["neox-base", "neox-trained-decay", "neox-sequential-straddle"])
def test_device_session_meets_published_logits(stand_in, exported, name, dialect):
    golden = Golden.load(name)
    model = dijiang.load(exported(name, dialect=dialect), provider="cuda")
    batch, length = golden.ids.shape
    state, half = model.new_state(batch), length // 2
    parts = [model.forward(golden.ids[:, :half], state, all_logits=True)]
    for t in range(half, length):
        parts.append(model.forward(golden.ids[:, t : t + 1], state, all_logits=True))
    assert golden.error(np.concatenate(parts, axis=1)) <= GATE


def test_states_take_turns_on_one_session(stand_in, exported):
    path = exported("neox-base")
    device, host = (dijiang.load(path, provider=name) for name in ("cuda", "cpu"))
    states = [[m.new_state() for _ in range(3)] for m in (device, host)]
    random = np.random.default_rng(0)
    for _ in range(25):
        which, ids = random.integers(3), random.integers(0, 90, (1, random.integers(1, 40)))
        pairs = zip((device, host), states, strict=True)
        found, expected = (m.forward(ids, s[which]) for m, s in pairs)
        np.testing.assert_allclose(found, expected, atol=GATE)
    for found, expected in zip(states[0][2].layers, states[1][2].layers, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_padded_batch_matches_the_cpu(stand_in, exported):
    path = exported("neox-base")
    random = np.random.default_rng(3)
    ids, mask = random.integers(0, 90, (3, 12)), random.integers(0, 2, (3, 12))
    mask[:, 5] = 1
    logits = []
    for name in ("cuda", "cpu"):
        model = dijiang.load(path, provider=name)
        logits.append(model.forward(ids, model.new_state(3), mask=mask))
    np.testing.assert_allclose(*logits, atol=GATE)


def test_greedy_text_is_the_cpus_and_no_logits_are_read(stand_in, exported, monkeypatch):
    path = exported("tiny-python")
    texts = []
    for name in ("cpu", "cuda"):
        model = dijiang.load(path, provider=name)
        if name == "cuda":
            monkeypatch.setattr(model._session, "run", None)
        texts.append("".join(r.text for r in model.generate("def main(", max_tokens=20)))
    assert texts[0] == texts[1]


def test_decode_steps_have_one_graph_a_side_and_prefill_none(stand_in, exported, monkeypatch):
    used = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def spy(self, io, options=None):
        used.append(options.get_run_config_entry("gpu_graph_id"))
        run(self, io, options)

    model = dijiang.load(exported("neox-base"), provider="cuda")
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", spy)
    assert model._session.cuda_graph
    state = model.new_state()
    model.forward([[1, 2, 3]], state)
    for token in range(4):
        model.forward([[token]], state)
    prefill, *steps = used
    assert prefill == "-1"
    assert steps[0] != steps[1]
    assert steps[:2] == steps[2:]
    assert "0" not in steps


def test_graphs_that_change_results_are_not_used(stand_in, corrupting, exported):
    path = exported("neox-base")
    model = dijiang.load(path, provider="cuda")
    assert not model._session.cuda_graph
    expected = dijiang.load(path, provider="cpu")
    np.testing.assert_allclose(
        model.forward([[1]], model.new_state()), expected.forward([[1]], expected.new_state()), atol=GATE
    )
    with pytest.raises(dijiang.SessionError, match=r"CUDA graphs change the result \(\d+ of \d+"):
        dijiang.load(path, provider="cuda", cuda_graph=True)
    assert not dijiang.load(path, provider="cuda", cuda_graph=False)._session.cuda_graph


def test_capture_that_fails_falls_back_to_plain_steps(stand_in, exported, monkeypatch):
    run = onnxruntime.InferenceSession.run_with_iobinding

    def refuse(self, io, options=None):
        if options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("operation not permitted when stream is capturing")
        run(self, io, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", refuse)
    path = exported("neox-base")
    assert not dijiang.load(path, provider="cuda")._session.cuda_graph
    with pytest.raises(dijiang.SessionError, match="not permitted when stream is capturing"):
        dijiang.load(path, provider="cuda", cuda_graph=True)


@pytest.mark.parametrize(("head_size", "longest"), [(64, 256), (80, 256), (128, 256), (256, 16)])
def test_prefill_length_that_cuda_kernels_take(stand_in, exported, monkeypatch, head_size, longest):
    session = dijiang.load(exported("neox-base"), provider="cuda")._session
    monkeypatch.setattr(session, "_spec", SimpleNamespace(head_size=head_size))
    for dialect, expected in (("ort", longest), ("onnx", longest), ("primitive", 256)):
        bundle = SimpleNamespace(manifest=SimpleNamespace(dialect=dialect))
        monkeypatch.setattr(session, "_bundle", bundle)
        assert session.longest == expected


def test_prompt_goes_through_in_short_pieces_where_it_must(stand_in, exported, monkeypatch):
    path = exported("neox-base")
    monkeypatch.setattr(cuda.DeviceSession, "longest", 3)
    model, whole = (dijiang.load(path, provider=name) for name in ("cuda", "cpu"))
    ids = np.arange(20)[None]
    found, expected = (m.forward(ids, m.new_state()) for m in (model, whole))
    np.testing.assert_allclose(found, expected, atol=GATE)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Failed to allocate memory for requested buffer of size 1", "use a smaller model"),
        ("CUDA failure 2: out of memory", "use a smaller model"),
        ("CUDA failure 35: CUDA driver version is insufficient", "newer NVIDIA driver"),
        ("CUDA failure 101: invalid device ordinal", "one of the GPUs"),
        ("nodes that are assigned to the default CPU EP", r"pip install 'onnxruntime-gpu\[cuda"),
        ("no kernel image is available", "built for this GPU"),
        ("anything\nelse", "see dijiang doctor"),
    ],
)
def test_what_onnxruntime_says_is_one_line_with_the_next_step(
    stand_in, exported, monkeypatch, text, advice
):
    def fail(*args, **kwargs):
        raise RuntimeError(text)

    path = exported("neox-base")
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", fail)
        with pytest.raises(dijiang.SessionError, match=advice) as raised:
            dijiang.load(path, provider="cuda")
    assert "\n" not in str(raised.value)
    model = dijiang.load(path, provider="cuda", cuda_graph=False)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fail)
    with pytest.raises(dijiang.SessionError, match=rf"failed in a step of 2 tokens .*{advice}"):
        model.forward([[1, 2]], model.new_state())


@pytest.mark.parametrize("name", ["cuda", "ort-tensorrt", "ort-tensorrt-rtx"])
def test_provider_that_this_onnxruntime_lacks_is_refused(exported, name):
    with pytest.raises(
        dijiang.SessionError, match=rf"'{name}' is not available: onnxruntime .* has .*CPU"
    ):
        dijiang.load(exported("neox-base"), provider=name)


def test_provider_that_onnxruntime_swapped_is_refused(exported, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "cuda", Provider("CUDAExecutionProvider", "install it", memory="cpu"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    create = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, sess_options, providers, enable_fallback: create(path, sess_options),
    )
    with pytest.raises(dijiang.SessionError, match=r"asked for CUDA.*, onnxruntime used CPU"):
        dijiang.load(exported("neox-base"), provider="cuda")


@pytest.mark.parametrize("provider", ["tpu", "cuda:x", "cuda:", ":0", "auto:1", "cpu:0"])
def test_provider_that_does_not_exist_is_refused(exported, provider):
    with pytest.raises(dijiang.SessionError, match=rf"execution provider '{provider}'"):
        dijiang.load(exported("neox-base"), provider=provider)


def test_device_number_reaches_the_provider(exported, monkeypatch):
    seen = {}

    def record(path, sess_options, providers, enable_fallback):
        seen["providers"], seen["fallback"] = providers, enable_fallback
        seen["strict"] = sess_options.get_session_config_entry("session.disable_cpu_ep_fallback")
        raise RuntimeError("enough")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: seen.update(preloaded=True))
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    with pytest.raises(dijiang.SessionError, match="enough"):
        dijiang.load(exported("neox-base", dialect="onnx"), provider="cuda:2")
    ((name, settings),) = seen["providers"]
    assert name == "CUDAExecutionProvider"
    assert settings == {"device_id": "2", "enable_cuda_graph": "1", "use_tf32": "0"}
    assert (seen["fallback"], seen["strict"], seen["preloaded"]) == (0, "1", True)


def test_auto_is_the_cpu_without_a_driver_and_cuda_with_one(exported, monkeypatch):
    path = exported("neox-base")
    monkeypatch.setattr("dijiang.runtime.driver.LIBRARY", "libnothing.so")
    model = dijiang.load(path)
    assert model._session.provider == "CPUExecutionProvider"
    monkeypatch.setattr("dijiang.runtime.driver.load_library", FakeLibcuda)
    assert providers._best(model.bundle) == "cpu"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert providers._best(model.bundle) == "cuda"


def test_bfloat16_on_the_cpu_is_refused(exported):
    with pytest.raises(dijiang.SessionError, match=r"no bfloat16 kernels for the CPU; use --provider"):
        dijiang.load(exported("neox-base", precision="bf16"), provider="cpu")


def test_integer_blocks_on_cuda_are_refused(exported):
    path = exported("neox-base", target="tensorrt", precision="int8")
    with pytest.raises(dijiang.SessionError, match=r"CUDA has no kernels for the int8 blocks"):
        dijiang.load(path, provider="cuda")


def test_cuda_graphs_on_the_cpu_are_refused(exported):
    with pytest.raises(dijiang.SessionError, match="the CPU has no CUDA graphs"):
        dijiang.load(exported("neox-base"), provider="cpu", cuda_graph=True)


def test_both_onnxruntime_packages_are_refused():
    check_single_onnxruntime(lambda name: "1.32.0" if name == "onnxruntime" else missing(name))
    with pytest.raises(dijiang.SessionError, match=r"both installed.*pip uninstall -y onnxruntime"):
        check_single_onnxruntime(lambda name: "1.32.0")


def missing(name):
    raise PackageNotFoundError(name)


def test_this_environment_has_one_onnxruntime():
    check_single_onnxruntime()
    assert "onnxruntime" in sys.modules
