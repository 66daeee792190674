"""The TensorRT session on a GPU that is not there: the CPU's numbers, and one line for each error."""

import gc
import sys
import threading

import numpy as np
import pytest

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.machine import driver, memory
from tests.conftest import Golden, take_turns
from tests.fake_gpu import FakeLibcuda, fake_tensorrt

GATE = 1e-4


@pytest.fixture
def cuda(monkeypatch):
    """The driver in use."""
    library = FakeLibcuda()
    monkeypatch.setattr("dijiang.machine.driver.load_library", lambda: library)
    return library


@pytest.fixture
def trt(cuda, monkeypatch):
    """The TensorRT in use."""
    module = fake_tensorrt(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def built(exported, copy_of, trt):
    """built(checkpoint, **options): a bundle with an engine for the GPU that is not there."""

    def get(name, batch=1, longest=32):
        bundle = copy_of(exported(name, graph="primitive"))
        return dijiang.build(bundle, backend="tensorrt", batch=batch, longest=longest).path

    return get


@pytest.mark.parametrize("cuda_graph", [None, True, False], ids=["auto", "graph", "no graph"])
@pytest.mark.parametrize("name", ["neox-base", "neox-trained-decay", "neox-sequential-straddle"])
def test_engine_meets_published_logits(built, cuda, name, cuda_graph):
    golden = Golden.load(name)
    batch, length = golden.ids.shape
    model = dijiang.load(built(name, batch), provider="tensorrt", cuda_graph=cuda_graph)
    state, half = model.new_state(batch), length // 2
    parts = [model.forward(golden.ids[:, :half], state, all_logits=True)]
    for t in range(half, length):
        parts.append(model.forward(golden.ids[:, t : t + 1], state, all_logits=True))
    assert golden.error(np.concatenate(parts, axis=1)) <= GATE
    assert cuda.launches == (0 if cuda_graph is False else length - half)
    assert state.position.tolist() == [length] * batch


def test_graphs_change_nothing_and_are_captured_once_a_side(built, cuda):
    path = built("neox-base")
    results = []
    for cuda_graph in (True, False):
        model = dijiang.load(path, provider="tensorrt", cuda_graph=cuda_graph)
        state = model.new_state()
        steps = [model.forward([[t]], state) for t in range(9)]
        results.append([*steps, *state.layers])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    assert len(cuda.graphs) == 2


def test_whole_pieces_of_a_prompt_are_captured_once_a_side(built, cuda):
    path = built("neox-base", longest=8)
    prompt, results = np.arange(45)[None], []
    for cuda_graph in (True, False):
        model = dijiang.load(path, provider="tensorrt", cuda_graph=cuda_graph)
        state = model.new_state()
        results.append([model.forward(prompt, state), *state.layers])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    assert (cuda.launches, len(cuda.graphs)) == (5, 2)
    model.forward(prompt, model.new_state(), all_logits=True)
    assert cuda.launches == 5


def test_graphs_are_captured_anew_where_the_results_move(built, cuda):
    """Logits of many tokens need more memory than those of one: graphs that write to the old go."""
    path = built("neox-base")
    gpu, cpu = (dijiang.load(path, provider=name) for name in ("tensorrt", "cpu"))
    states = [m.new_state() for m in (gpu, cpu)]
    for ids, every in (([1], False), ([2], False), ([3], False), ([4, 5, 6, 7], True), ([8], False), ([9], False)):
        found, expected = (m.forward([ids], s, all_logits=every) for m, s in zip((gpu, cpu), states, strict=True))
        np.testing.assert_allclose(found, expected, atol=GATE)
    assert len(cuda.graphs) == 2


def test_any_thread_may_go_on_or_look(built):
    model = dijiang.load(built("neox-base"), provider="tensorrt")
    state, found = model.new_state(), []
    first = model.forward([[1, 2, 3]], state)
    for work in (lambda: model.forward([[4]], state), state.clone):
        thread = threading.Thread(target=lambda work=work: found.append(work()))
        thread.start()
        thread.join()
    logits, fork = found
    again = model.new_state()
    assert np.array_equal(model.forward([[1, 2, 3]], again), first)
    assert np.array_equal(model.forward([[4]], again), logits)
    assert np.array_equal(model.forward([[5]], again), model.forward([[5]], fork))


def test_states_take_turns_on_one_engine(built):
    path = built("neox-base")
    gpu, cpu = (dijiang.load(path, provider=name) for name in ("tensorrt", "cpu"))
    states = take_turns(gpu, cpu, 39, GATE)
    fork = states[0][1].clone()
    np.testing.assert_allclose(gpu.forward([[7]], fork), gpu.forward([[7]], states[0][1]), atol=1e-6)
    for found, expected in zip(states[0][2].layers, states[1][2].layers, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_state_changed_on_the_host_is_used(built):
    model = dijiang.load(built("neox-base"), provider="tensorrt")
    state = model.new_state()
    first = model.forward([[3, 4, 5]], state)
    for layer in state.layers:
        layer[...] = 0
    state.position[:] = 0
    assert np.array_equal(model.forward([[3, 4, 5]], state), first)


def test_saved_state_continues(built, tmp_path):
    model = dijiang.load(built("neox-base"), provider="tensorrt")
    state = model.new_state()
    model.forward([[3, 4, 5]], state)
    state.save(tmp_path / "s.safetensors")
    again = dijiang.State.load(tmp_path / "s.safetensors")
    assert np.array_equal(model.forward([[6]], again), model.forward([[6]], state))


def test_only_the_token_leaves_the_gpu(built, cuda):
    model = dijiang.load(built("neox-base"), provider="tensorrt")
    tokens = [r.token for r in model.generate([1, 2, 3], max_tokens=12, ignore_eos=True)]
    assert cuda.down == 8 * 12
    cpu = dijiang.load(model.bundle.path, provider="cpu")
    expected = [r.token for r in cpu.generate([1, 2, 3], max_tokens=12, ignore_eos=True)]
    assert tokens == expected
    *_, last = model.generate([1, 2, 3], max_tokens=3, temperature=1.0, seed=1)
    assert cuda.down > 8 * 12 + 2 * 4 * model.spec.vocab_size
    assert last.generated == 3


def test_engine_has_a_profile_for_steps_and_one_for_prefill(built, trt):
    built("neox-base", batch=2, longest=32)
    (build,) = trt.built
    step, prefill = (profile.shapes for profile in build.config.profiles)
    assert step["input_ids"] == [[1, 1], [1, 1], [2, 1]]
    assert prefill["input_ids"] == [[1, 1], [1, 32], [2, 32]]
    assert prefill["logit_indices"] == [[1, 1], [1, 1], [2, 32]]
    assert prefill["past_key_values.1.recurrent_state"][2] == [2, 4, 16, 16]
    assert build.network.flags == 2  # strongly typed
    assert build.config.flags == set()  # no TF32


def test_timings_are_kept_for_the_next_build(built, trt):
    path = built("neox-base")
    dijiang.build(path, backend="tensorrt")
    assert trt.timings == [b"", b"timings"]
    assert open_bundle(path).manifest.files["next-tensorrt.timing"]
    assert not (path / "tensorrt.timing").exists()
    trt.fails.add("timing")  # of another GPU: TensorRT does not take it
    dijiang.build(path, backend="tensorrt")
    assert trt.timings == [b"", b"timings", b"timings", b""]


def test_engine_of_another_version_or_gpu_is_refused(built, trt, cuda):
    path = built("neox-base")
    trt.__version__ = "10.16.1"
    with pytest.raises(
        dijiang.SessionError,
        match=r"built with TensorRT 10.3.0 for sm87, here is 10.16.1 .*rebuild with",
    ):
        dijiang.load(path, provider="tensorrt")
    trt.__version__, cuda.sm = "10.3.0", "110"
    with pytest.raises(dijiang.SessionError, match=r"here is 10.3.0 on Fake Orin \(sm110\); rebuild"):
        dijiang.load(path, provider="tensorrt")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("load", "cannot load it; rebuild with: dijiang build"),
        ("context", "cannot create an execution context; use a smaller model"),
        ("execute", "failed in a step of 1 tokens; see nvidia-smi"),
    ],
)
def test_engine_that_fails_is_one_error(built, trt, failure, message):
    path = built("neox-base")
    trt.fails.add(failure)
    with pytest.raises(dijiang.SessionError, match=message):
        next(dijiang.load(path, provider="tensorrt").generate([1]))


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("builder", dijiang.SessionError, r"could not start \(pybind11.*check that its CUDA version"),
        ("build", dijiang.ExportError, r"cannot build it for sm87 \(no kernel for this\)"),
    ],
)
def test_build_that_fails_leaves_the_bundle_as_it_was(exported, copy_of, trt, failure, error, message):
    bundle = copy_of(exported("neox-base", graph="primitive"))
    before = sorted(path.name for path in bundle.iterdir())
    trt.fails.add(failure)
    with pytest.raises(error, match=message):
        dijiang.build(bundle, backend="tensorrt")
    assert sorted(path.name for path in bundle.iterdir()) == before
    assert open_bundle(bundle).manifest.engines == {}


def test_engine_that_does_not_fit_is_refused_before_it_is_loaded(built, cuda):
    path = built("neox-base")
    cuda.free = 1 << 20
    with pytest.raises(dijiang.SessionError, match=r"needs 0.27 GB of GPU memory, 0.00 GB are free"):
        dijiang.load(path, provider="tensorrt")


def test_free_memory_of_a_jetson_is_that_of_the_host(built, cuda, monkeypatch):
    """File pages count as taken for the driver, and go when they are needed."""
    path = built("neox-base")
    cuda.free, cuda.integrated = 1 << 20, True
    monkeypatch.setattr(driver, "available_bytes", lambda: 1 << 30)
    cuda_free = driver.Cuda().gpu.free
    assert cuda_free == 1 << 30
    cuda.free = 8 << 30
    model = dijiang.load(path, provider="tensorrt")
    assert model.forward([[1]], model.new_state()).shape == (1, model.spec.vocab_size)


def test_build_that_does_not_fit_into_memory_is_refused_with_numbers(exported, copy_of, trt, monkeypatch):
    bundle = copy_of(exported("neox-base", graph="primitive"))
    monkeypatch.setattr(memory, "available_bytes", lambda: 300_000_000)
    with pytest.raises(
        dijiang.ExportError,
        match=r"building its engine needs 0.42 GB of memory, 0.30 GB are free; close",
    ):
        dijiang.build(bundle, backend="tensorrt")
    assert trt.built == []
    assert open_bundle(bundle).manifest.engines == {}


def test_allocation_that_fails_says_out_of_memory(built, cuda):
    model = dijiang.load(built("neox-base"), provider="tensorrt")
    cuda.free = 16
    with pytest.raises(dijiang.SessionError, match=r"CUDA error 2 \(out of memory\); use a smaller model"):
        model.forward([[1]], model.new_state())


def test_larger_batch_than_the_engine_takes_says_how_to_rebuild(built):
    model = dijiang.load(built("neox-base"), provider="tensorrt")
    with pytest.raises(dijiang.SessionError, match=r"batch is 2, the engine takes 1; .* --batch 2"):
        model.forward([[1], [2]], model.new_state(2))


def test_bundle_without_an_engine_says_how_to_get_one(exported, trt):
    with pytest.raises(dijiang.SessionError, match=r"has no tensorrt engine, it has none; run dijiang"):
        dijiang.load(exported("neox-base", graph="primitive"), provider="tensorrt")


def test_memory_goes_back_when_the_model_goes(built, cuda):
    path = built("neox-base")
    for _ in range(3):
        model = dijiang.load(path, provider="tensorrt")
        model.forward([[1, 2, 3]], model.new_state(), all_logits=True)
        model.forward([[1]], model.new_state())
        assert cuda.memory
        del model
        gc.collect()
        assert not cuda.memory


def test_gpu_that_is_not_there_is_refused(built):
    with pytest.raises(dijiang.SessionError, match="GPU 3 does not exist, expected one of 1"):
        dijiang.load(built("neox-base"), provider="tensorrt:3")


def test_auto_takes_the_engine_where_there_is_a_gpu(built):
    model = dijiang.load(built("neox-base"))
    assert model.provider == "TensorRT 10.3.0"
