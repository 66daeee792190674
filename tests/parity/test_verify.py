"""verify: measures right, and fails when it should."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import dijiang
from dijiang.bundle.opened import open_bundle
from dijiang.cli import main
from dijiang.models.load import load_checkpoint
from dijiang.models.reference import Reference
from dijiang.parity import verify
from dijiang.parity.comparison import _has_learned
from dijiang.parity.difference import Difference, Sums
from dijiang.parity.gates import judge
from dijiang.parity.verify import default_slice
from dijiang.parity.windows import CHARACTERS, OWN, RANDOM, windows_of
from dijiang.recipe import PRECISIONS, resolve
from tests.conftest import EXAMPLES, GOLDEN, onnx_file, signed
from tests.graph.test_families import NAMED
from tests.random_models import write

TINY = EXAMPLES / "tiny-python"


def test_verify_reports_and_stores_every_figure(exported, copy_of):
    bundle = copy_of(exported("tiny-python"))
    report = dijiang.verify(bundle, TINY, text=TINY / "held_out.txt", tokens=600)
    assert report.passed
    assert report.same_source
    assert (report.tokens, report.steps) == (600, 128)
    assert 0 < report.logits.max_error <= 1e-4
    assert report.logits.top1_agreement == 1
    assert report.logits.perplexity == pytest.approx(report.logits.reference_perplexity, rel=1e-5)
    assert [e.length for e in report.state_errors] == [1, 8, 64, 256, 512]
    assert all(e.rms_relative_error < 1e-5 for e in report.state_errors)
    stored = open_bundle(bundle).parity
    assert stored == json.loads(json.dumps(report.to_dict()))


def test_state_errors_are_relative_to_the_references_states(exported):
    bundle, checkpoint = exported("neox-base"), GOLDEN["neox-base"]
    report = dijiang.verify(bundle, checkpoint, tokens=40, store=False)
    ids, model = np.array(report.detail.ids), dijiang.load(bundle, graph=report.graph)
    state, reference = model.new_state(), Reference(load_checkpoint(checkpoint))
    kept, start = reference.new_state(1), 0
    assert [error.length for error in report.state_errors] == [1, 8, 40]
    assert report.steps == 40
    assert max(one.step_error for one in report.each) > 0  # sums in another order
    for error in report.state_errors:
        model.forward(ids[None, start : error.length], state)
        reference.forward(ids[None, start : error.length], start, kept)
        start = error.length
        pairs = list(zip(state.layers, kept, strict=True))
        found = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
        assert error.rms_relative_error == pytest.approx(max(found), rel=1e-6)
        assert error.layer == np.argmax(found)


def test_verify_without_text_has_no_perplexity(exported, copy_of):
    report = dijiang.verify(copy_of(exported("neox-base")), GOLDEN["neox-base"], tokens=50)
    assert report.logits.perplexity is None
    assert report.tokens == 50


def test_verify_fails_when_one_weight_is_off(exported, copy_of):
    bundle = copy_of(exported("neox-base", graph="primitive"))
    graph = onnx_file(bundle)
    model = onnx.load(graph)
    weight = next(w for w in model.graph.initializer if w.name.startswith("layers.0.out.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.05
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    (bundle / "model.onnx.data").unlink()
    onnx.save(model, graph, save_as_external_data=True, location="model.onnx.data")
    signed(bundle, graph, bundle / "model.onnx.data")
    report = dijiang.verify(bundle, GOLDEN["neox-base"], tokens=40)
    assert not report.passed
    with pytest.raises(dijiang.ParityError, match=r"error_over_float32 .* allowed 8.0e\+00; layer 1 is the worst"):
        report.require()
    assert open_bundle(bundle).parity["passed"] is False


def test_verify_notices_another_checkpoint(exported, copy_of):
    report = dijiang.verify(
        copy_of(exported("tiny-python")), GOLDEN["tiny-python-published"], tokens=20, store=False
    )
    assert not report.same_source
    assert not report.passed


def test_verify_of_analytic_decay_shows_what_it_changed(exported, copy_of):
    bundle = copy_of(exported("tiny-python-published", decay="analytic"))
    report = dijiang.verify(bundle, GOLDEN["tiny-python-published"], text=TINY / "held_out.txt", tokens=1024)
    assert report.passed
    assert report.decay_change.max_error > 0.1
    assert 0.85 < report.decay_change.top1_agreement < 0.99


def test_learned_positions_are_no_trained_decay(tmp_path):
    folder = write(tmp_path, NAMED["opt-125m-like"], trained=False, seed=1)
    bundle = dijiang.export(folder, tmp_path / "b", decay="analytic", verify=False)
    assert dijiang.verify(bundle.path, folder, tokens=20, store=False).decay_change is None


def test_no_more_of_a_text_is_read_than_its_tokens_can_need(exported, tmp_path, monkeypatch):
    model, text, read = dijiang.load(exported("tiny-python")), tmp_path / "large.txt", []
    text.write_text("x = 1\n" * 100_000)
    encode = model.tokenizer.encode
    monkeypatch.setattr(model.tokenizer, "encode", lambda part: read.append(len(part)) or encode(part))
    _, windows = windows_of(model, text, 100, 64, own=False)
    assert (read, [len(ids) for ids in windows]) == ([CHARACTERS * 100], [64, 36])


def test_model_that_draws_no_text_is_compared_on_random_ids():
    """As one whose logits hold NaN: the comparison then says so."""

    def generate(*_, **__):
        raise dijiang.SessionError("the logits hold NaN")

    broken = SimpleNamespace(spec=SimpleNamespace(vocab_size=50), generate=generate)
    source, (ids,) = windows_of(broken, None, 12, 512, own=True)
    assert (source, len(ids)) == (RANDOM, 12)
    assert (ids >= 0).all()
    assert (ids < 50).all()


def test_verify_refuses_a_text_that_is_not_there(exported):
    with pytest.raises(dijiang.InputError, match="cannot be read"):
        dijiang.verify(exported("tiny-python"), TINY, text="nowhere.txt", store=False)


@pytest.mark.samples
def test_reference_meets_the_published_perplexity():
    """perplexity.json: all 99 whole windows of 512 tokens of the held-out text. test_quantize: so do bundles."""
    from dijiang.runtime.text import TextTokenizer

    expected = json.loads((TINY / "perplexity.json").read_text())
    text = (TINY / "held_out.txt").read_text(encoding="utf-8")
    ids = np.array(TextTokenizer.read(TINY / "tokenizer.json").encode(text))
    assert len(ids) == expected["tokens"]
    reference, sums = Reference(load_checkpoint(TINY), np.float32), Sums()
    for group in np.split(ids[: 99 * 512].reshape(99, 512), 9):
        for row, logits in zip(group, reference.forward(group), strict=True):
            sums.add(logits, logits, row)
    assert sums.result(is_text=True).perplexity == pytest.approx(expected["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("parameters", "text", "expected"),
    [
        (10**6, True, (4096, 512)),
        (10**6, False, (512, 512)),
        (10**9, True, (600, 512)),
        (10**9, False, (150, 512)),
        (10**11, True, (32, 512)),
    ],
)
def test_large_models_are_compared_on_fewer_tokens(parameters, text, expected):
    long = SimpleNamespace(parameters=parameters, positions_limit=None, spec=SimpleNamespace(max_positions=2048))
    assert default_slice(long, text=text) == expected
    long.positions_limit = 40
    assert default_slice(long, text=text)[1] == 40


def test_difference_agrees_with_a_naive_twin():
    random = np.random.default_rng(1)
    a, ids = random.normal(size=(9, 13)), random.integers(0, 13, 9)
    b = a + random.normal(size=a.shape) * 0.3
    sums = Sums()
    sums.add(a, b, ids)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    likelihoods = [[x[t, ids[t + 1]] for t in range(8)] for x in (p, q)]
    naive = Difference(
        max_error=max(abs(x - y) for x, y in zip(a.flat, b.flat, strict=True)),
        rms_relative_error=np.linalg.norm(b - a) / np.linalg.norm(a),
        reference_rms=np.sqrt((a**2).mean()),
        kl=sum(np.sum(p[t] * np.log(p[t] / q[t])) for t in range(9)) / 9,
        top1_agreement=sum(int(x.argmax() == y.argmax()) for x, y in zip(a, b, strict=True)) / 9,
        reference_entropy=-np.sum(p * np.log(p)) / 9,
        reference_perplexity=1 / np.prod(likelihoods[0]) ** (1 / 8),
        perplexity=1 / np.prod(likelihoods[1]) ** (1 / 8),
    )
    found = sums.result(is_text=True)
    for name, value in vars(naive).items():
        assert getattr(found, name) == pytest.approx(value), name


def test_nan_passes_no_gate():
    sums, logits = Sums(), np.ones((3, 5))
    sums.add(logits, logits, np.arange(3))
    sums.add(logits, np.full((3, 5), np.nan), np.arange(3))
    found = sums.result(is_text=False)
    assert np.isnan([found.max_error, found.rms_relative_error, found.kl]).all()
    first, *others = resolve("fp32").gates
    metrics = dict.fromkeys((gate.metric for gate in others), 0.0) | {first.metric: found.rms_relative_error}
    verdicts = judge((first, *others), metrics)
    assert [v.passed for v in verdicts] == [False, *[True] * len(others)]


def test_every_precision_has_gates():
    assert all(row.gates for row in PRECISIONS.values())


def test_bundle_that_cannot_be_written_is_refused_before_it_is_compared(exported, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(verify, "compare_bundle", None)
    with pytest.raises(
        dijiang.BundleError, match="cannot be written; make it writable, or verify with store=False"
    ):
        dijiang.verify(exported("neox-base"), GOLDEN["neox-base"])


def linked(bundle, folder):
    """As the Hub's cache has it: links to files with other names."""
    blobs, snapshot = folder / "models--o--n" / "blobs", folder / "models--o--n" / "snapshots" / "abc"
    for place in (blobs, snapshot):
        place.mkdir(parents=True)
    for number, file in enumerate(sorted(bundle.iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def hard_linked(bundle, folder):
    """As uv and `cp -l` copy: each file has two names."""
    return shutil.copytree(bundle, folder / "copy", copy_function=os.link)


@pytest.mark.parametrize("layout", [linked, hard_linked])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_bundle_behind_links_is_verified(exported, tmp_path, layout, precision):
    target = {} if precision == "fp32" else {"target": "cuda"}
    bundle = layout(exported("neox-base", precision=precision, **target), tmp_path)
    assert dijiang.verify(bundle, GOLDEN["neox-base"], store=False).passed


def test_random_ids_are_no_text():
    sure, unsure = (SimpleNamespace(reference_entropy=nats) for nats in (0.0, 9.0))
    assert _has_learned(OWN, sure, 100)
    assert not _has_learned(OWN, unsure, 100)
    assert not _has_learned(RANDOM, sure, 100)
    assert _has_learned("a.txt", unsure, 100)


def test_failed_gate_is_told_where_its_report_cannot_be_kept(exported, edit_tensors, monkeypatch):
    def refuse(*_):
        raise dijiang.BundleError("disk full")

    def edit(tensors):
        tensors["embed_out.weight"][3] *= 1.5

    monkeypatch.setattr("dijiang.parity.verify.store_report", refuse)
    other = edit_tensors("neox-base", edit)
    words = ["verify", exported("neox-base"), "--against", other, "--tokens", "20"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 1
    assert "the bundle differs from its checkpoint" in done.output
