"""The NumPy reference against the published code's logits, and its two forms against each other."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from dijiang.models.initial import tensors, write_shards
from dijiang.models.load import load_checkpoint
from dijiang.models.presets import PRESETS
from dijiang.models.reference import Piece, Reference
from dijiang.models.weights import is_decay_table

from ..conftest import GOLDEN, Golden


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_reference_meets_published_logits_in_both_forms(name):
    golden = Golden.load(name)
    reference = Reference(load_checkpoint(golden.path))
    parallel = reference.forward(golden.ids)
    recurrent = reference.forward(golden.ids, 0, reference.new_state(len(golden.ids)))
    assert golden.error(parallel) <= 2e-5  # float32 rounding of the published code
    np.testing.assert_allclose(recurrent, parallel, atol=1e-12)


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
    write_shards(tmp_path, tensors(config, 0), "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_checkpoint(tmp_path)
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
