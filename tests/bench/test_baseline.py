"""The Transformer that bundles are compared with is a right one: against float64 attention."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dijiang.bench import render, runner
from dijiang.bench.cached import CachedSubject
from dijiang.bench.measure import Run
from dijiang.bench.runner import Options, run_bench
from dijiang.bench.transformer import VanillaModel, build_transformer, random_weights, write_transformer
from dijiang.bundle.opened import open_bundle
from dijiang.errors import ExportError, InputError
from dijiang.models.reference import Reference, rotate
from dijiang.models.spec import ModelSpec
from dijiang.runtime.sessions.inference import runs_here

pytestmark = pytest.mark.skipif(not runs_here("ort"), reason="the baseline needs onnxruntime 1.30")

PYTHIA = ModelSpec(
    family="gpt_neox",
    vocab_size=300,
    hidden_size=128,
    intermediate_size=512,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    max_positions=64,
    norm_eps=1e-5,
    activation="gelu",
    parallel_residual=True,
    rotary_dims=16,
    rotary_base=10000.0,
)
SHAPES = {
    "pythia": PYTHIA,
    "sequential": replace(PYTHIA, parallel_residual=False),
    "rotated-before": replace(PYTHIA, rotary_dims=20),
}


class SoftmaxAttention(Reference):
    """The oracle: the reference's blocks with causal softmax attention over a whole sequence."""

    def __init__(self, spec, weights):
        super().__init__(VanillaModel(spec, weights, 0), np.float64)

    def _attention(self, layer, w, x, piece):
        spec, (batch, length, _) = self.spec, x.shape
        positions = np.broadcast_to(np.arange(length), (batch, length))
        qkv = (x @ w["qkv.weight"] + w["qkv.bias"]).reshape(batch, length, 3, spec.num_heads, -1)
        q, k = (rotate(qkv[:, :, i], positions, spec).swapaxes(1, 2) for i in (0, 1))
        scores = q @ k.swapaxes(2, 3) / np.sqrt(spec.head_size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weight / weight.sum(-1, keepdims=True) @ qkv[:, :, 2].swapaxes(1, 2)
        return mixed.swapaxes(1, 2).reshape(x.shape) @ w["out.weight"] + w["out.bias"]


def last_logits(subject, ids, pieces):
    """Logits of the last token after prompts in pieces."""
    state = subject.at(len(ids), 0, ids.shape[1])
    start = 0
    for length in pieces:
        logits = subject.forward(ids[:, start : start + length], state)
        start += length
    assert start == ids.shape[1] == state.position
    return logits


@pytest.mark.parametrize("pieces", [[63], [1] * 63, [40, 1, 22]], ids=["whole", "steps", "pieces"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformer_meets_float64_attention(shape, pieces, tmp_path):
    spec = SHAPES[shape]
    write_transformer(spec, tmp_path, 63, cache="fp32")
    subject = CachedSubject(tmp_path, 1, "cpu")
    ids = np.random.default_rng(0).integers(spec.vocab_size, size=(2, 63))
    expected = SoftmaxAttention(spec, random_weights(spec)).forward(ids)[:, -1]
    np.testing.assert_allclose(last_logits(subject, ids, pieces), expected, atol=2e-5)


@pytest.mark.parametrize(("cache", "bound"), [("fp16", 2e-3), ("int8", 0.2)])
def test_smaller_caches_stay_near(cache, bound, tmp_path):
    write_transformer(PYTHIA, tmp_path, 63, cache=cache)
    subject = CachedSubject(tmp_path, 1, "cpu")
    ids = np.random.default_rng(0).integers(300, size=(1, 63))
    expected = SoftmaxAttention(PYTHIA, random_weights(PYTHIA)).forward(ids)[:, -1]
    assert np.abs(last_logits(subject, ids, [60, 1, 1, 1]) - expected).max() < bound * expected.std()


def test_cache_is_written_in_place_and_counted(tmp_path):
    traffic = write_transformer(PYTHIA, tmp_path, 40, cache="fp16")
    subject = CachedSubject(tmp_path, 1, "cpu")
    state = subject.at(2, 30, 40)
    assert sum(k.nbytes + v.nbytes for k, v in state.layers) == traffic.resident(2, 40)
    assert traffic.cache == 2 * 2 * 2 * 128
    before = [k.copy() for k, _ in state.layers]
    subject.forward(np.array([[1], [2]]), state)
    for old, (new, _) in zip(before, state.layers, strict=True):
        changed = (old != new).any(axis=(0, 1, 3))
        assert np.flatnonzero(changed).tolist() == [30]


@pytest.mark.parametrize("batch", [1, 2])
def test_timed_steps_are_those_of_forward(batch, tmp_path):
    write_transformer(PYTHIA, tmp_path, 40, cache="fp32")
    subject = CachedSubject(tmp_path, 1, "cpu")
    ids = np.random.default_rng(0).integers(300, size=(batch, 5))
    timed, plain = (subject.at(batch, 0, 40) for _ in range(2))
    tokens = subject.prefill(ids, timed)
    logits = subject.forward(ids, plain)
    for following, _ in zip(subject.steps(tokens, timed), range(6), strict=False):
        logits = subject.forward(logits.argmax(axis=-1)[:, None], plain)
        np.testing.assert_array_equal(following, logits.argmax(axis=-1))


def test_projections_are_as_merged_as_a_bundles(tmp_path):
    import onnx

    write_transformer(PYTHIA, tmp_path, 40)
    nodes = [n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert nodes.count("MatMul") == 2 * PYTHIA.num_layers + 1
    assert nodes.count("GroupQueryAttention") == PYTHIA.num_layers


def test_depth_past_learned_positions_is_refused(tmp_path):
    spec = replace(PYTHIA, family="opt", learned_positions=True, rotary_dims=0, parallel_residual=False)
    write_transformer(spec, tmp_path, 500, cache="fp32")
    subject = CachedSubject(tmp_path, 1, "cpu")
    with pytest.raises(InputError, match="500 positions, this Transformer has embeddings for 64"):
        subject.at(1, 499, 500)
    assert subject.forward(np.array([[1, 2]]), subject.at(1, 0, 2)).shape == (1, 300)


def test_graphs_without_a_baseline_are_refused(exported, tmp_path):
    bundle = open_bundle(exported("tiny-python", graph="primitive"))
    with pytest.raises(ExportError, match="no baseline"):
        build_transformer("m", bundle, tmp_path, 10)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_bench_puts_the_measured_ratio_beside_the_predicted_one(exported, precision):
    path = exported("tiny-python", precision=precision)
    options = Options("5", "4", "0,500", repetitions=5, seconds=0.0, baseline="transformer")
    report = run_bench([path], options, baseline=build_transformer)
    assert report["errors"] == []
    rows = json.loads(render.to_llama_bench(report))
    assert [
        row["n_batch"] for row in rows if row["n_prompt"] and row["model_type"] == report["models"][1]["name"]
    ] == [5, 5]
    held = open_bundle(path)
    assert {row["model_n_params"] for row in rows} == {held.manifest.parameters}
    assert rows[0]["model_size"] == held.data_bytes
    bundle, transformer = (m["traffic"] for m in report["models"])
    assert report["models"][1]["baseline_of"] == report["models"][0]["name"]
    assert [r["test"] for r in report["ratios"]] == ["pp5", "pp5 @ d500", "tg4", "tg4 @ d500"]
    prompt, _, shallow, deep = report["ratios"]
    assert prompt["predicted"] is None
    assert deep["low"] <= deep["measured"] <= deep["high"]
    # The middle one of four tokens has 501.5 before it, and writes its own.
    moved = transformer["weights"] + transformer["rows"] + (501.5 + 1) * transformer["cache"]
    own = bundle["weights"] + bundle["rows"] + 2 * bundle["state"]
    assert deep["predicted"] == pytest.approx(moved / own)
    assert shallow["predicted"] < deep["predicted"]


def test_no_ratio_between_providers(exported, monkeypatch):
    """A bundle on a GPU and its baseline on the CPU are no comparison."""

    class Pretending(Run):
        def series(self, sides, tests):
            super().series(sides, tests)
            next(iter(self.samples.values())).provider = "CUDAExecutionProvider"

    monkeypatch.setattr(runner, "Run", Pretending)
    options = Options("none", "3", repetitions=1, seconds=0.0, baseline="transformer")
    report = run_bench([exported("tiny-python")], options, baseline=build_transformer)
    assert (len(report["results"]), report["ratios"]) == (2, [])
    assert "use --provider cpu" in report["errors"][0]["message"]


def test_no_two_weights_are_the_same():
    weights = random_weights(PYTHIA)
    names = [name for name in weights if name.endswith(".weight") and "norm" not in name]
    drawn = {weights[name].ravel()[:16].tobytes() for name in names}
    assert len(drawn) == len(names)
