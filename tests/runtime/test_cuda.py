"""The session with memory of its own, on the CPU in place of a GPU."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

import dijiang
from dijiang.batching.batcher import Batcher
from dijiang.recipe import PROVIDERS
from dijiang.runtime.sessions import device, device_session, providers
from dijiang.runtime.step import Step
from tests import fake_ort
from tests.batching.test_batcher import alone, requests, run, turn_of
from tests.conftest import EXAMPLES, RUNNABLE, Golden, take_turns

NEEDS_ORT = pytest.mark.skipif("ort" not in RUNNABLE, reason="onnxruntime is older than 1.30")

GATE = 1e-4
#: The stand-in runs the CPU's own kernels.
NEAR = 1e-5
#: A provider with "device memory" that every machine has; `fake_ort` gives it graphs.
STAND_IN = device.Device("CPUExecutionProvider", "nothing", "", memory=None, captures="enable_cuda_graph")


@pytest.fixture
def stand_in(monkeypatch):
    """`cuda` is the CPU's provider, through the device's session, with CUDA graphs."""
    fake_ort.install(monkeypatch)
    monkeypatch.setattr(device, "CUDA", STAND_IN)
    # The kernels of the cuda graph are their twins.
    monkeypatch.setattr(device_session, "load_kernels", lambda index: None)
    monkeypatch.setattr(providers, "why_no_kernels", lambda: "")


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


@pytest.mark.parametrize("graph", [graph for graph in PROVIDERS["cuda"].graphs if graph in RUNNABLE])
@pytest.mark.parametrize("name", ["neox-base", "neox-trained-decay", "neox-sequential-straddle"])
def test_device_session_meets_published_logits(stand_in, exported, name, graph):
    golden = Golden.load(name)
    model = dijiang.load(exported(name, graph=graph), provider="cuda")
    batch, length = golden.ids.shape
    state, half = model.new_state(batch), length // 2
    parts = [model.forward(golden.ids[:, :half], state, all_logits=True)]
    for t in range(half, length):
        parts.append(model.forward(golden.ids[:, t : t + 1], state, all_logits=True))
    assert golden.error(np.concatenate(parts, axis=1)) <= GATE


def test_states_take_turns_on_one_session(stand_in, exported):
    path = exported("neox-base")
    device, host = (dijiang.load(path, provider=name) for name in ("cuda", "cpu"))
    states = take_turns(device, host, 39, NEAR)
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
    np.testing.assert_allclose(*logits, atol=NEAR)


def test_greedy_text_is_the_cpus_and_no_logits_are_read(stand_in, exported, monkeypatch):
    path = exported("tiny-python")
    texts = []
    for name in ("cpu", "cuda"):
        model = dijiang.load(path, provider=name)
        if name == "cuda":
            monkeypatch.setattr(
                device_session.DeviceOutput, "logits", property(lambda _: pytest.fail("logits were read"))
            )
        texts.append("".join(r.text for r in model.generate("def main(", max_tokens=20)))
    assert texts[0] == texts[1]


def check_traffic(model, seen):
    """A greedy step moves the position in and the token id out, 8 bytes each; a chosen token goes in, too."""
    steps = model.generate([1, 2, 3], max_tokens=50, ignore_eos=True)
    for _ in range(4):  # both sides have been fed their mask
        next(steps)
    for _ in range(20):
        seen.clear()
        next(steps)
        assert seen == [("in", 8), ("out", 8)]
    sampled = model.generate([1, 2, 3], max_tokens=50, ignore_eos=True, temperature=5.0, seed=1)
    for _ in range(4):
        next(sampled)
    for _ in range(20):
        seen.clear()
        next(sampled)
        assert seen == [("in", 8), ("in", 8), ("out", 4 * model.spec.vocab_size)]


def test_greedy_step_moves_sixteen_bytes(stand_in, exported, traffic):
    check_traffic(dijiang.load(exported("neox-base"), provider="cuda"), traffic)


def test_token_that_comes_again_is_fed_again_on_both_sides_in_turns(stand_in, exported):
    """The device's own choice lies where the token lay that was fed two steps before."""
    models = [dijiang.load(exported("neox-base"), provider=name) for name in ("cuda", "cpu")]
    states = [model.new_state() for model in models]
    for token in [7, 7, 7, 7, 3, 7, 3, 7]:
        found, expected = (m.forward([[token]], s) for m, s in zip(models, states, strict=True))
        np.testing.assert_allclose(found, expected, atol=NEAR)


def test_what_an_interrupted_copy_left_on_the_device_is_not_believed(stand_in, exported, monkeypatch):
    model, cpu = (dijiang.load(exported("neox-base"), provider=name) for name in ("cuda", "cpu"))
    state, other = model.new_state(), cpu.new_state()
    for token in (5, 6, 5):  # both sides have their tensors
        step = Step.of(np.array([[token]]), state.position, np.array([[0]]))
        chosen = int(model.session.run(step, state).tokens[0, 0])  # it lies where the next token is fed
        cpu.forward([[token]], other)
    write = onnxruntime.OrtValue.update_inplace

    def interrupted(self, array):
        write(self, array)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.OrtValue, "update_inplace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward([[chosen - 1]], state)
    found, expected = model.forward([[chosen]], state), cpu.forward([[chosen]], other)
    np.testing.assert_allclose(found, expected, atol=NEAR)


@pytest.fixture
def graph_ids(monkeypatch):
    """The graph id of every run, in order."""
    used = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def spy(self, io, options=None):
        used.append(options.get_run_config_entry("gpu_graph_id"))
        run(self, io, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", spy)
    return used


def test_decode_steps_have_one_graph_a_side_and_short_prompts_none(stand_in, exported, graph_ids):
    model = dijiang.load(exported("neox-base"), provider="cuda")
    graph_ids.clear()
    assert model.session.cuda_graph
    state = model.new_state()
    model.forward([[1, 2, 3]], state)
    for token in range(4):
        model.forward([[token]], state)
    prefill, *steps = graph_ids
    assert prefill == "-1"
    assert steps[0] != steps[1]
    assert steps[:2] == steps[2:]
    assert "0" not in steps


def test_whole_pieces_of_a_prompt_have_graphs_too(stand_in, exported, monkeypatch, graph_ids):
    monkeypatch.setattr(device_session.DeviceSession, "longest", 4)
    model = dijiang.load(exported("neox-base"), provider="cuda")
    graph_ids.clear()
    prompt = np.arange(18)[None]
    model.forward(prompt, model.new_state())
    first, second, third, fourth, rest = graph_ids
    assert (first, second) == (third, fourth)
    assert first != second
    assert "-1" not in (first, second)
    assert rest == "-1"  # two tokens are left over
    graph_ids.clear()
    model.forward(prompt[:, :8], model.new_state(), all_logits=True)
    assert set(graph_ids) == {"-1"}


def test_pieces_whose_graphs_change_results_leave_those_of_steps(stand_in, exported, monkeypatch):
    run = onnxruntime.InferenceSession.run_with_iobinding

    def spoilt(self, io, options=None):
        run(self, io, options)
        captured = options is not None and options.get_run_config_entry("gpu_graph_id") != "-1"
        for output in io.get_outputs():
            if captured and len(output.shape()) == 4:  # a state
                steps = model_steps[-1]
                output.update_inplace(output.numpy() * (2 if steps > 1 else 1))

    model_steps = []
    step = device_session.DeviceSession.run

    def note(self, inputs, state):
        model_steps.append(inputs.ids.shape[1])
        return step(self, inputs, state)

    monkeypatch.setattr(device_session.DeviceSession, "longest", 4)
    monkeypatch.setattr(device_session.DeviceSession, "run", note)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", spoilt)
    path = exported("neox-base")
    model, expected = (dijiang.load(path, provider=name) for name in ("cuda", "cpu"))
    assert model.session.cuda_graph
    found, wanted = (m.forward(np.arange(12)[None], m.new_state()) for m in (model, expected))
    np.testing.assert_allclose(found, wanted, atol=NEAR)
    with pytest.raises(dijiang.SessionError, match=r"captured steps change the result \(\d+ of \d+"):
        dijiang.load(path, provider="cuda", cuda_graph=True)


def test_graphs_that_change_results_are_not_used(stand_in, corrupting, exported):
    path = exported("neox-base")
    model = dijiang.load(path, provider="cuda")
    assert not model.session.cuda_graph
    expected = dijiang.load(path, provider="cpu")
    np.testing.assert_allclose(
        model.forward([[1]], model.new_state()), expected.forward([[1]], expected.new_state()), atol=NEAR
    )
    with pytest.raises(dijiang.SessionError, match=r"captured steps change the result \(\d+ of \d+"):
        dijiang.load(path, provider="cuda", cuda_graph=True)
    assert not dijiang.load(path, provider="cuda", cuda_graph=False).session.cuda_graph


def test_numbers_that_are_none_in_both_ways_are_the_same(stand_in, exported, monkeypatch):
    run = onnxruntime.InferenceSession.run_with_iobinding

    def lost(self, io, options=None):
        run(self, io, options)
        for output in io.get_outputs():
            if output.data_type() == "tensor(float)":
                output.update_inplace(output.numpy() * np.float32(np.nan))

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", lost)
    assert dijiang.load(exported("neox-base"), provider="cuda", cuda_graph=True).session.cuda_graph


def test_capture_that_fails_falls_back_to_plain_steps(stand_in, exported, monkeypatch):
    run = onnxruntime.InferenceSession.run_with_iobinding

    def refuse(self, io, options=None):
        if options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("operation not permitted when stream is capturing")
        run(self, io, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", refuse)
    path = exported("neox-base")
    assert not dijiang.load(path, provider="cuda").session.cuda_graph
    with pytest.raises(dijiang.SessionError, match="not permitted when stream is capturing"):
        dijiang.load(path, provider="cuda", cuda_graph=True)


@pytest.mark.parametrize(("head_size", "longest"), [(64, 256), (80, 256), (128, 256), (256, 16)])
def test_prefill_length_that_cuda_kernels_take(stand_in, exported, monkeypatch, head_size, longest):
    session = dijiang.load(exported("neox-base"), provider="cuda").session
    monkeypatch.setattr(session, "spec", SimpleNamespace(head_size=head_size))
    for graph, expected in (("ort", longest), ("onnx", longest), ("primitive", 256)):
        monkeypatch.setattr(session, "graph", graph)
        assert session.longest == expected


def test_prompt_goes_through_in_short_pieces_where_it_must(stand_in, exported, monkeypatch):
    path = exported("neox-base")
    monkeypatch.setattr(device_session.DeviceSession, "longest", 3)
    model, whole = (dijiang.load(path, provider=name) for name in ("cuda", "cpu"))
    ids = np.arange(20)[None]
    found, expected = (m.forward(ids, m.new_state()) for m in (model, whole))
    np.testing.assert_allclose(found, expected, atol=NEAR)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Failed to allocate memory for requested buffer of size 1", "use a smaller model"),
        ("CUDA failure 2: out of memory", "use a smaller model"),
        ("CUDA failure 35: CUDA driver version is insufficient", "newer NVIDIA driver"),
        ("CUDA failure 101: invalid device ordinal", "one of the GPUs"),
        ("nodes that are assigned to the default CPU EP", r"pip install 'onnxruntime-gpu\[cuda"),
        ("no kernel image is available", "built for this GPU"),
        ("libcuda.so.1: cannot open shared object file", "install the NVIDIA driver"),
        ("libcublasLt.so.13: cannot open shared object file", r"pip install 'onnxruntime-gpu\[cuda"),
        ("anything\nelse", "see dijiang doctor"),
    ],
)
def test_what_onnxruntime_says_is_one_line_with_the_next_step(stand_in, exported, monkeypatch, text, advice):
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


@NEEDS_ORT
@pytest.mark.parametrize(("precision", "tokens"), [("int8", 0), ("int4", 4096)])
def test_integers_for_cuda_meet_their_gates_through_the_device_session(stand_in, exported, precision, tokens):
    bundle = exported("tiny-python", target="cuda", precision=precision, calibration_tokens=tokens)
    text = EXAMPLES / "tiny-python" / "held_out.txt"
    for provider in ("cpu", "cuda"):  # rounded as a GPU would, and by the CPU's kernels
        report = dijiang.verify(
            bundle, EXAMPLES / "tiny-python", text=text, tokens=512, provider=provider, store=False
        )
        assert report.failures == ()


@NEEDS_ORT
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_graph_of_integers_for_cuda_has_only_what_its_kernels_take(exported, precision):
    graph = onnx.load(exported("tiny-python", target="cuda", precision=precision) / "model.onnx").graph
    kinds = {weight.name: weight.data_type for weight in graph.initializer}
    matmuls = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(matmuls) == 2 * 6 + 1
    for node in matmuls:
        codes, scales = node.input[1:]  # no zero points, no bias
        assert (kinds[codes], kinds[scales]) == (onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16)
        assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 0
    assert not [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    (lookup,) = (n for n in graph.node if n.op_type == "Gather" and n.input[1] == "input_ids")
    assert kinds[lookup.input[0]] == onnx.TensorProto.FLOAT16


@NEEDS_ORT
def test_many_turns_on_a_device_are_what_each_is_alone(stand_in, exported):
    """They join, leave, are swapped out and forked, where the states lie on the device."""
    path = exported("tiny-python", graph="ort")
    model, host = dijiang.load(path, provider="cuda"), dijiang.load(path)
    asked = list(requests(model, 10, 5))
    turns = [
        turn_of(model, prompt, priority=n % 2, keeps=True, **options) for n, (prompt, options) in enumerate(asked)
    ]
    run(Batcher(model, 3, 20), turns)
    for turn, (prompt, options) in zip(turns, asked, strict=True):
        state = host.new_state()
        assert turn.listener.result[0] == alone(host, prompt, state=state, **options)[0]
        for found, expected in zip(turn.state.layers, state.layers, strict=True):
            np.testing.assert_allclose(found, expected, atol=NEAR)


def test_replays_that_change_results_are_not_used(stand_in, exported, monkeypatch):
    """A capture is right, what replays it is not: as where an address moved."""
    run, seen = onnxruntime.InferenceSession.run_with_iobinding, set()

    def spoilt(self, io, options=None):
        run(self, io, options)
        graph = options.get_run_config_entry("gpu_graph_id")
        if graph != "-1" and (id(self), graph) in seen:
            for output in io.get_outputs():
                output.update_inplace(output.numpy() * 2)
        seen.add((id(self), graph))

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", spoilt)
    assert not dijiang.load(exported("neox-base"), provider="cuda").session.cuda_graph
