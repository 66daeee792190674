"""The NumPy reference against the published code's logits, and its two forms against each other."""

import tracemalloc
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from dijiang.models.load import load_checkpoint
from dijiang.models.presets import PRESETS
from dijiang.models.reference import Piece, Reference, feature_map, group_norm, rotate, silu
from dijiang.models.weights import is_decay_table
from tests.conftest import GOLDEN, Golden
from tests.graph.test_families import NAMED
from tests.random_models import write


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_reference_meets_published_logits_in_both_forms(name):
    golden = Golden.load(name)
    reference = Reference(load_checkpoint(golden.path))
    parallel = reference.forward(golden.ids)
    recurrent = reference.forward(golden.ids, 0, reference.new_state(len(golden.ids)))
    assert golden.error(parallel) <= 2e-5  # float32 rounding of the published code
    np.testing.assert_allclose(recurrent, parallel, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("trained", [False, True], ids=["analytic", "tabled"])
@pytest.mark.parametrize("name", NAMED)
def test_every_number_on_the_way_has_its_type(tmp_path, name, trained, dtype):
    """A float32 reference that is float64 in places is nearer than float32 can be: right graphs are refused."""
    kinds = set()

    class Watched(Reference):
        def _layer(self, layer, w, x, piece):
            kinds.update((x.dtype, *(tensor.dtype for tensor in w.values())))
            return super()._layer(layer, w, x, piece)

        def _linear(self, w, name, x):
            y = super()._linear(w, name, x)
            kinds.update((x.dtype, y.dtype))
            return y

    reference = Watched(load_checkpoint(write(tmp_path, NAMED[name], trained=trained)), dtype)
    for state in (None, reference.new_state(1)):
        kinds.add(reference.forward(np.array([[1, 2, 3]]), 0, state).dtype)
    assert kinds == {np.dtype(dtype)}


def test_weights_are_read_once_for_all_pieces_and_one_layer_at_a_time(tmp_path):
    hidden, layers = 96, 12
    config = PRESETS["pythia-70m"] | {
        "vocab_size": 50,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "rotary_pct": 0.5,
        "max_position_embeddings": 16,
    }
    model = load_checkpoint(write(tmp_path, config))
    reads = Counter()

    class Counted(Mapping):
        def __getitem__(self, name):
            reads[name] += 1
            return model.weights[name]

        def __iter__(self):
            return iter(model.weights)

        def __len__(self):
            return len(model.weights)

    reference = Reference(replace(model, weights=Counted()))
    ids = np.arange(6)[None]
    state = reference.new_state(1)
    pieces = [Piece(ids[:, :2], 0, state), Piece(ids[:, 2:], 2, state), Piece(ids)]
    tracemalloc.start()
    first, second, whole = reference.run(pieces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-12)
    assert reads == {name: 1 for name in model.weights if not is_decay_table(name)}
    layer_bytes = 8 * 13 * hidden**2  # float64; qkv, gate, out, mlp up and down
    assert peak < 2 * layer_bytes


def test_grouped_attention_with_trained_tables_is_the_published_sum(tmp_path):
    """o_t = sum over s <= t of (D1_t phi(q_t) . D2_s phi(k_s)) v_s, one query head after the other."""
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 32, "intermediate_size": 7} | {
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 12,
    }
    model = load_checkpoint(write(tmp_path, config, trained=True))
    w = {n.removeprefix("layers.0."): model.weights[n].astype(np.float64) for n in model.weights}
    x = np.random.default_rng(0).normal(size=(1, 12, 32))
    qkv = (x @ w["qkv.weight"]).reshape(1, 12, 12, 4)
    qk = feature_map(rotate(qkv[:, :, :10], np.arange(12)[None], model.spec), w["proj.weight"])[0]
    out = np.zeros((12, 8, 4))
    for head in range(8):
        kv = head // 4
        for t in range(12):
            for s in range(t + 1):
                scale = w["D1"][kv, t] * w["D2"][kv, s]
                out[t, head] += scale * (qk[t, head] @ qk[s, 8 + kv]) * qkv[0, s, 10 + kv]
    normed = group_norm(out.reshape(12, 32), w["group_norm.weight"], w["group_norm.bias"], 4, 1e-5)
    expected = (silu(x[0] @ w["gate.weight"]) * normed) @ w["out.weight"]
    reference = Reference(model)
    for state in (None, reference.new_state(1)):
        found = reference._attention(0, w, x, Piece(np.zeros((1, 12), int), 0, state))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
