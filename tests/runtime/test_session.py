"""The session uses what was asked for, or says what is missing."""

import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.cli import main
from dijiang.machine import memory
from dijiang.runtime.sessions import inference, trial
from dijiang.runtime.step import Step
from tests.conftest import EXAMPLES, RUNNABLE, onnx_file, signed


def test_unknown_provider_is_refused(exported):
    with pytest.raises(dijiang.SessionError, match="execution provider 'tpu' is not available"):
        dijiang.load(exported("neox-base"), provider="tpu")


def test_provider_in_use_is_the_one_asked_for(exported):
    model = dijiang.load(exported("neox-base"), provider="cpu")
    assert model.provider == "CPUExecutionProvider"


def test_missing_backend_names_the_extras(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(dijiang.SessionError, match=r"pip install 'dijiang\[cpu\]'"):
        dijiang.load(exported("neox-base"))


@pytest.mark.parametrize("length", [2, 3, 7])
@pytest.mark.parametrize("graph", RUNNABLE)
def test_a_piece_of_a_prompt_leaves_the_layers_that_it_read(exported, graph, length):
    """So a piece that fails has changed nothing."""
    model = dijiang.load(exported("neox-base", graph=graph))
    state = model.new_state()
    for token in range(3):
        model.forward([[token]], state)
    read = state.point.layers
    before = [layer.tobytes() for layer in read]
    model.forward(np.arange(length)[None], state)
    assert [layer.tobytes() for layer in read] == before
    assert all((new != old).any() for new, old in zip(state.layers, read, strict=True))


PIECES = [[5, 6, 7], [], [8], [9] * 11]


def fed_before(model):
    """A state of four sequences that have seen some tokens each."""
    state = model.new_state(4)
    ids = np.arange(20).reshape(4, 5)
    model.forward(ids, state, mask=np.tri(5, dtype=int)[1:])
    return state


@pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["neox-base", "neox-sequential-straddle", "neox-trained-2048"])
def test_ragged_step_is_each_sequence_alone(exported, name, precision):
    model = dijiang.load(exported(name, graph="native", precision=precision))
    assert model.session.ragged
    together, wanted = fed_before(model), [3, 0]
    layers = together.layers
    for _ in range(2):
        output = model.session.run(Step.ragged(PIECES, together.position, wanted), together)
        assert (output.logits.shape, output.tokens.shape) == ((2, 1, model.spec.vocab_size), (2, 1))
    assert together.layers is layers  # a step of many slots copies no state
    for row, piece in enumerate(PIECES):
        alone = fed_before(model).take([row])
        for _ in range(2 * bool(piece)):
            logits = model.forward([piece], alone)
        # Projections of onnxruntime differ in the last bits by the number of rows; ours do not.
        close = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0, "atol": 0}
        for ours, theirs in zip(together.layers, alone.layers, strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], **close)
        if row in wanted:
            np.testing.assert_allclose(output.logits[wanted.index(row)], logits, **close)
            assert output.tokens[wanted.index(row), 0] == logits.argmax()
        for part in ("position", "last", "seen", "history"):
            assert np.array_equal(getattr(together, part)[row], getattr(alone, part)[0]), part


def test_warm_steps_are_not_timed(exported, monkeypatch):
    """The first steps take 100 s each, what follows 2 s."""
    now, steps, warm = [0.0], [], trial.WARM_STEPS

    class Session:
        def step(self, state):
            return Step.single(state.batch)

        def run(self, step, state):
            steps.append((int(step.ids[0, 0]), int(step.positions[0, 0])))
            now[0] += 100 if len(steps) <= warm else 2
            state.commit(state.after(step))
            return SimpleNamespace(tokens=np.array([[len(steps)]]))

    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])
    assert trial.decode_rate(Session(), open_bundle(exported("neox-base")), seconds=10) == 0.5
    assert steps == [(n, n) for n in range(warm + 5)]


def test_running_a_bundle_writes_no_file(exported, tmp_path, monkeypatch):
    bundle = exported("neox-base")
    monkeypatch.chdir(tmp_path)
    model = dijiang.load(bundle)
    model.forward([[1, 2, 3]], model.new_state())
    del model
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["coloredlogs", "sympy"])
def test_backend_that_lacks_a_package_of_its_own_is_installed_and_broken(exported, monkeypatch, name):
    class Finder:
        @staticmethod
        def find_spec(wanted, path=None, target=None):
            if wanted == "onnxruntime":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    bundle = exported("neox-base")
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(dijiang.SessionError, match=rf"installed but does not start \(No module named '{name}'\)"):
        dijiang.load(bundle)


def test_graph_that_the_backend_cannot_load_is_one_error(exported, copy_of):
    bundle = copy_of(exported("neox-base", graph="primitive"))
    newer = b"\x08\x63"  # field 1, the version of the file format: 99
    data = onnx_file(bundle).read_bytes()
    onnx_file(bundle).write_bytes(newer + data[2:])
    signed(bundle, onnx_file(bundle))
    with pytest.raises(dijiang.SessionError, match=r"cannot load the primitive graph .*upgrade"):
        dijiang.load(bundle, check_hashes=False)


@pytest.mark.parametrize(
    ("python", "oldest", "first"),
    [
        ((3, 10, 14), (1, 19), "upgrade"),
        ((3, 10, 14), (1, 30), "use Python 3.11"),
        ((3, 11, 0), (1, 30), "upgrade"),
    ],
)
def test_an_upgrade_that_python_3_10_cannot_have_starts_with_python(monkeypatch, python, oldest, first):
    monkeypatch.setattr(inference, "sys", SimpleNamespace(version_info=python))
    assert inference.upgrade(oldest).startswith(first)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_blocks_on_an_onnxruntime_without_them_are_one_error(exported, monkeypatch, precision):
    monkeypatch.setattr(inference, "version", lambda _: "1.18.1")
    bundle = exported("tiny-python", graph="primitive", precision=precision)
    with pytest.raises(
        dijiang.SessionError, match=r"the primitive graph: it needs onnxruntime 1.19 .* here is 1.18; upgrade"
    ):
        dijiang.load(bundle)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_inspect_and_export_know_what_the_precision_needs(exported, monkeypatch, tmp_path, precision):
    monkeypatch.setattr(inference, "version", lambda _: "1.18.1")
    bundle = exported("tiny-python", graph="primitive", precision=precision)
    shown = CliRunner().invoke(main, ["inspect", str(bundle)]).stdout
    assert ("not here: it needs onnxruntime 1.19" in shown) == (precision == "int8")
    if precision == "int8":
        with pytest.raises(dijiang.ExportError, match=r"cannot be verified: it needs onnxruntime 1\.19"):
            dijiang.export(EXAMPLES / "tiny-python", tmp_path / "b", graph="primitive", precision=precision)


def test_step_that_the_backend_cannot_run_is_one_error(exported, monkeypatch):
    def fail(self, io):
        raise RuntimeError("Non-zero status code\nreturned while running a node")

    model = dijiang.load(exported("neox-base"))
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fail)
    with pytest.raises(dijiang.SessionError, match=r"failed in a step of 2 tokens .*; use") as raised:
        model.forward([[1, 2]], model.new_state())
    assert "\n" not in str(raised.value)


def test_threads_reach_the_backend(exported):
    model = dijiang.load(exported("neox-base"), threads=1)
    assert model.session._session.get_session_options().intra_op_num_threads == 1


def test_bundle_that_does_not_fit_into_memory_is_refused_with_numbers(exported, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 30_000_000)
    with pytest.raises(dijiang.SessionError, match=r"needs 0.05 GB of memory, 0.03 GB are free; close"):
        dijiang.load(exported("tiny-python"))
