"""Configs in every spelling: ours and transformers' reading are the same."""

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dijiang.models import gpt_neox, llama
from dijiang.models.load import FAMILIES
from dijiang.models.rotary import inverse_frequencies

#: transformers takes the powers in float32.
RTOL = 1e-6
ACTS = [("hidden_act",), ("activation_function",)]
SIZES = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 8, "num_hidden_layers": 1}
SIZES |= {"vocab_size": 7, "max_position_embeddings": 24}
BASES = st.sampled_from([10000.0, 500.0, 1e6, 10000])
SHARES = st.sampled_from([0.25, 0.5, 1.0, 0.75])
LENGTHS = st.sampled_from([8, 16])
LINEAR = st.fixed_dictionaries({"factor": st.sampled_from([2.0, 4])})
LLAMA3 = st.fixed_dictionaries(
    {"factor": st.just(8.0), "low_freq_factor": st.just(1.0), "high_freq_factor": st.just(4.0)},
    optional={"original_max_position_embeddings": LENGTHS},
)


@st.composite
def ropes(draw, share):
    """`rope_scaling` or `rope_parameters`: absent, empty, or of any kind and spelling."""
    kind = draw(st.sampled_from(["none", "empty", "default", "linear", "llama3"]))
    if kind in ("none", "empty"):
        return None if kind == "none" else {}
    rope = {draw(st.sampled_from(["type", "rope_type"])): kind}
    rope |= draw({"default": st.just({}), "linear": LINEAR, "llama3": LLAMA3}[kind])
    beside = {"rope_theta": BASES} | ({"partial_rotary_factor": SHARES} if share else {})
    return rope | draw(st.fixed_dictionaries({}, optional=beside))


@st.composite
def configs(draw, base, share):
    """Sizes and every key of rotary positions, old and new, in any mixture."""
    keys = {base: BASES, "rope_scaling": ropes(share), "rope_parameters": ropes(share)}
    keys |= {"original_max_position_embeddings": LENGTHS} | ({share: SHARES} if share else {})
    return SIZES | draw(st.fixed_dictionaries({}, optional=keys))


def frequencies(config, rotary):
    """transformers' inverse frequencies, float64."""
    return rotary(config).inv_freq.double().numpy()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(config=configs("rope_theta", None))
def test_llama(config):
    theirs = transformers.LlamaConfig(**config)
    found = inverse_frequencies(llama.spec(config))
    np.testing.assert_allclose(found, frequencies(theirs, LlamaRotaryEmbedding), rtol=RTOL)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(config=configs("rotary_emb_base", "rotary_pct"))
def test_gpt_neox(config):
    theirs = transformers.GPTNeoXConfig(**config)
    found = inverse_frequencies(gpt_neox.spec(config))
    np.testing.assert_allclose(found, frequencies(theirs, GPTNeoXRotaryEmbedding), rtol=RTOL)
    published = gpt_neox.published_config(config)
    assert published["rotary_pct"] == theirs.rope_parameters["partial_rotary_factor"]
    assert published["rotary_emb_base"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "opt"])
@pytest.mark.parametrize(
    "keys", [("hidden_act",), ("activation_function",), ("hidden_act", "activation_function"), ()]
)
def test_each_family_reads_its_own_name_of_the_activation(family, keys):
    theirs_of = {"gpt_neox": transformers.GPTNeoXConfig, "llama": transformers.LlamaConfig}
    theirs_of["opt"] = transformers.OPTConfig
    config = SIZES | {"ffn_dim": 8} | dict(zip(keys, ("silu", "relu"), strict=False))
    theirs = theirs_of[family](**config)
    own = "activation_function" if family == "opt" else "hidden_act"
    assert FAMILIES[family].spec(config | {"word_embed_proj_dim": 96}).activation == getattr(theirs, own)
