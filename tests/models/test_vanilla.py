"""Converted checkpoints of transformers' own models, with softmax attention put back into our blocks.

Logits then equal those of transformers: embeddings, norms, rotary positions, projections, MLPs and
heads are right against code that is not ours, and `convert` has left every weight as it was.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dijiang.models.convert import convert
from dijiang.models.load import FAMILIES, load_checkpoint
from dijiang.models.reference import Reference, rotate
from tests.random_models import configs

SMALL = {"vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 48}
NEOX = SMALL | {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 37}
LLAMA = SMALL | {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 37}
OPT = SMALL | {"hidden_size": 24, "num_attention_heads": 3, "ffn_dim": 31}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
#: Name -> (config class, model class, options).
CASES = {
    "neox-parallel": ("GPTNeoX", NEOX | {"use_parallel_residual": True}),
    "neox-sequential": ("GPTNeoX", NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "neox-unbiased-tied": ("GPTNeoX", NEOX | {"attention_bias": False, "tie_word_embeddings": True}),
    "neox-rotary-half": (
        "GPTNeoX",
        NEOX | {"rope_parameters": {"rope_theta": 99.0, "partial_rotary_factor": 0.5}},
    ),
    "opt-pre-norm": ("OPT", OPT | {"word_embed_proj_dim": 24}),
    "opt-post-norm-projected": ("OPT", OPT | {"word_embed_proj_dim": 10, "do_layer_norm_before": False}),
    "opt-unbiased": ("OPT", OPT | {"word_embed_proj_dim": 24, "enable_bias": False}),
    "llama-gqa-1": ("Llama", LLAMA | {"num_key_value_heads": 8}),
    "llama-gqa-4-biased-tied": (
        "Llama",
        LLAMA
        | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
        | {"tie_word_embeddings": True},
    ),
    "llama-gqa-8-llama3": ("Llama", LLAMA | {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    ),
}


class WithSoftmax(Reference):
    """The reference with vanilla attention in place of DiJiang's."""

    def _attention(self, layer, w, x, piece):
        spec, length = self.spec, x.shape[1]
        shared = spec.num_heads // spec.num_kv_heads
        positions = np.broadcast_to(np.arange(length), x.shape[:2])
        q, k, v = np.split(
            self._linear(w, "qkv", x).reshape(*x.shape[:2], -1, spec.head_size),
            [spec.num_heads, spec.num_heads + spec.num_kv_heads],
            axis=2,
        )
        q, k = (rotate(z, positions, spec) for z in (q, k))
        k, v = (np.repeat(z, shared, axis=2) for z in (k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(spec.head_size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
        return self._linear(w, "out", out.reshape(x.shape))


def random_model(family, options, folder, seed=0):
    """A model of transformers with random weights, norms and biases too, saved in `folder`."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CASES)
def test_our_blocks_with_softmax_attention_are_those_of_transformers(name, tmp_path):
    model = random_model(*CASES[name], tmp_path / "vanilla")
    convert(tmp_path / "vanilla", tmp_path / "converted")
    ids = np.random.default_rng(0).integers(0, 61, (2, 33))
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(ids)).logits.numpy()
    found = WithSoftmax(load_checkpoint(tmp_path / "converted")).forward(ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=2e-5)  # transformers' angles are float32


#: transformers has a padding id of 1 in every OPT vocabulary.
DRAWN = configs().filter(lambda config: config["vocab_size"] > 1)
CLASSES = {"gpt_neox": "GPTNeoX", "llama": "Llama", "opt": "OPT"}
assert CLASSES.keys() == FAMILIES.keys(), "a family that is compared with no code of others"


#: What a spec has beside what logits show -> names of it in transformers' configs.
FACTS = {
    "tied_embeddings": ("tie_word_embeddings",),
    "norm_eps": ("layer_norm_eps", "rms_norm_eps"),
    "activation": ("hidden_act", "activation_function"),
    "parallel_residual": ("use_parallel_residual",),
    "attention_bias": ("attention_bias", "enable_bias"),
    "mlp_bias": ("mlp_bias", "enable_bias"),
    "norm_first": ("do_layer_norm_before",),
    "num_kv_heads": ("num_key_value_heads",),
    "max_positions": ("max_position_embeddings",),
}


def require_facts(spec, family, theirs):
    """A spec says what a config of transformers does, where that has such a key."""
    assert spec.family == family
    for ours, names in FACTS.items():
        for name in names:
            if hasattr(theirs, name):
                assert getattr(spec, ours) == getattr(theirs, name), name
    rope = getattr(theirs, "rope_parameters", None)
    if rope is not None:
        assert spec.rotary_base == rope["rope_theta"]
        assert spec.rotary_dims == int(spec.head_size * rope.get("partial_rotary_factor", 1.0))


#: What every family asks for.
LEAST = SMALL | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 37, "ffn_dim": 31}


@pytest.mark.parametrize("family", CLASSES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    """But for token ids: transformers takes 2 for the end where nothing is said, which no tokenizer need have."""
    theirs = getattr(transformers, f"{CLASSES[family]}Config")(**LEAST)
    require_facts(FAMILIES[family].spec(LEAST), family, theirs)


@pytest.mark.parametrize("family", CLASSES)
def test_token_ids_of_a_config_are_read(family):
    spec = FAMILIES[family].spec(LEAST | {"bos_token_id": 5, "eos_token_id": [7, 9]})
    assert (spec.bos_token_id, spec.eos_token_ids) == (5, (7, 9))


def check_drawn(config, seed):
    """Spec and logits of a config, as transformers' own model has them, in float64."""
    options = {key: value for key, value in config.items() if key != "model_type"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_model(CLASSES[config["model_type"]], options, folder / "vanilla", seed)
        convert(folder / "vanilla", folder / "converted")
        ids = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, 9))
        with torch.no_grad():
            expected = model.double()(torch.from_numpy(ids)).logits.numpy()
        checkpoint = load_checkpoint(folder / "converted")
        found = WithSoftmax(checkpoint).forward(ids)
    require_facts(checkpoint.spec, config["model_type"], model.config)
    # transformers' angles are float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    theirs = model.config
    assert checkpoint.spec.num_layers == theirs.num_hidden_layers
    assert checkpoint.spec.tied_embeddings == theirs.tie_word_embeddings


@settings(max_examples=40, deadline=None, derandomize=True)
@given(config=DRAWN, seed=st.integers(0, 99))
def test_drawn_configs_have_the_logits_of_transformers(config, seed):
    check_drawn(config, seed)


@pytest.mark.soak
@settings(max_examples=2000, deadline=None)
@given(config=DRAWN, seed=st.integers(0, 10**6))
def test_2000_drawn_configs_have_the_logits_of_transformers(config, seed):
    check_drawn(config, seed)
