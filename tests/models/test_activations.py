"""Every row of the activation table: the function is that of transformers, and every graph computes it."""

import json

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

import dijiang
from dijiang.models.activations import ACTIVATIONS
from tests.conftest import RUNNABLE
from tests.random_models import write

#: One name of every row; some have several.
ROWS = {id(row): name for name, row in ACTIVATIONS.items()}
#: Of transformers, and not here: they have weights of their own.
PARAMETRIC = {"prelu", "xielu"}
LARGE = [-1e4, -700.0, -88.0, -20.0, 20.0, 88.0, 700.0, 1e4]


def test_all_of_transformers_are_here():
    assert set(ACT2FN) - set(ACTIVATIONS) == PARAMETRIC


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_function_is_that_of_transformers(name):
    x = np.r_[np.linspace(-12, 12, 4001), LARGE]
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name].function(x), expected, rtol=1e-12, atol=1e-12)
    single = ACTIVATIONS[name].function(x.astype("f4"))
    assert single.dtype == np.float32  # a number of NumPy's own would make it float64
    assert np.isfinite(single).all()


#: Where the activation is in nodes of its own, and where it may be in the node of a layer's step.
MODELS = {
    "gated": {"model_type": "llama", "num_key_value_heads": 2},
    "parallel": {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": True},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", sorted(ROWS.values()))
def test_every_graph_computes_it(name, model, tmp_path):
    config = MODELS[model] | {"hidden_size": 48, "vocab_size": 61, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 37}
    write(tmp_path, config | {"max_position_embeddings": 40, "hidden_act": name})
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == name
    bundle = dijiang.export(tmp_path, tmp_path / "b")
    assert bundle.passed  # of every graph that runs here, against the float64 reference
    assert set(bundle.manifest.graphs) == set(RUNNABLE) - {"onnx"}
