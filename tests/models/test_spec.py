"""config.json to ModelSpec: old and new spellings, and one line for what does not fit."""

import pytest

import dijiang
from dijiang.models import llama, opt
from dijiang.models.gpt_neox import spec
from dijiang.models.load import FAMILIES, load_checkpoint
from dijiang.models.presets import PRESETS
from dijiang.models.rotary import inverse_frequencies

PYTHIA_410M = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "hidden_act": "gelu",
    "eos_token_id": 0,
}


LLAMA2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "eos_token_id": 2,
}
OPT_350M = {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 1024,
    "word_embed_proj_dim": 512,
    "ffn_dim": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": False,
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "eos_token_id": 2,
}


def test_llama2_7b_is_read():
    found = llama.spec(LLAMA2_7B)
    assert (found.num_kv_heads, found.rotary_dims, found.state_shape) == (32, 128, (32, 128, 128))
    assert (found.norm, found.norm_eps, found.gated_mlp, found.activation) == ("rms", 1e-5, True, "silu")
    assert (found.attention_bias, found.mlp_bias, found.tied_embeddings) == (False, False, False)
    assert (found.rotary_base, found.rope_scaling, found.learned_positions) == (10000.0, None, False)


def test_llama3_is_read_in_both_spellings():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    grouped = LLAMA2_7B | {"num_key_value_heads": 8, "tie_word_embeddings": True}
    old = llama.spec(grouped | {"rope_theta": 500000.0, "rope_scaling": scaling})
    new = {k: v for k, v in grouped.items() if k != "rope_scaling"} | {"head_dim": 128}
    assert llama.spec(new | {"rope_parameters": scaling | {"rope_theta": 500000.0}}) == old
    assert (old.rotary_base, old.rope_scaling.kind, old.state_shape) == (5e5, "llama3", (8, 128, 128))


def test_opt_350m_is_read():
    found = opt.spec(OPT_350M)
    assert (found.embedding_size, found.norm_first, found.final_norm) == (512, False, False)
    assert (found.learned_positions, found.rotary_dims, found.tied_embeddings) == (True, 0, True)
    assert (found.attention_bias, found.mlp_bias, found.activation) == (True, True, "relu")
    for width in (1024, None):  # as transformers: null is hidden_size
        first = opt.spec(OPT_350M | {"do_layer_norm_before": True, "word_embed_proj_dim": width})
        assert (first.embedding_size, first.norm_first, first.final_norm) == (None, True, True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", ["<s>", 1.0, True, -1, 2**40, [1, 2]])
def test_start_token_that_is_none_is_refused_where_it_stands(family, value):
    config = next(one for one in PRESETS.values() if one["model_type"] == family)
    with pytest.raises(dijiang.CheckpointError, match=r"config.json: bos_token_id is .*, expected"):
        FAMILIES[family].spec(config | {"bos_token_id": value})


def test_llama3_factors_may_be_equal():
    """Then no frequency lies between the two lengths; some are scaled, others not."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
    spec = llama.spec(LLAMA2_7B | {"rope_scaling": scaling | {"original_max_position_embeddings": 512}})
    plain, scaled = inverse_frequencies(llama.spec(LLAMA2_7B)), inverse_frequencies(spec)
    assert set((plain / scaled).round(6)) == {1.0, 8.0}


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (llama.spec, LLAMA2_7B | {"head_dim": 96}, "head_dim is 96, expected .* = 128"),
        (
            llama.spec,
            LLAMA2_7B | {"num_key_value_heads": 5},
            "32 is not divisible by num_key_value_heads 5",
        ),
        (llama.spec, LLAMA2_7B | {"num_key_value_heads": 0}, "num_kv_heads is 0, expected more than 0"),
        (llama.spec, LLAMA2_7B | {"mlp_bias": "no"}, "mlp_bias is 'no', expected true or false"),
        (opt.spec, OPT_350M | {"layer_norm_elementwise_affine": False}, "without norm weights"),
        (opt.spec, OPT_350M | {"ffn_dim": None}, "ffn_dim is None, expected int"),
    ],
)
def test_config_without_an_exact_meaning_is_refused(read, config, message):
    with pytest.raises(dijiang.CheckpointError, match=message):
        read(config)


def test_pythia_410m_is_read():
    found = spec(PYTHIA_410M)
    assert (found.head_size, found.rotary_dims, found.state_shape) == (64, 16, (16, 64, 64))
    assert found.state_bytes == 24 * 16 * 64 * 64 * 4
    assert (found.parallel_residual, found.tied_embeddings, found.eos_token_ids) == (True, False, (0,))


def test_new_rope_spelling_means_the_same_as_the_old_one():
    old = {"rotary_pct", "rotary_emb_base"}
    new = {k: v for k, v in PYTHIA_410M.items() if k not in old} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    }
    assert spec(new) == spec(PYTHIA_410M)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_linear_scaling_is_read_in_both_spellings(key):
    found = spec(PYTHIA_410M | {"rope_scaling": {key: "linear", "factor": 4.0}})
    assert (found.rope_scaling.kind, found.rope_scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize("value", [None, 7, [7, 9]])
def test_end_tokens_come_in_three_forms(value):
    expected = {None: (), 7: (7,)}.get(value if not isinstance(value, list) else 0, (7, 9))
    assert spec(PYTHIA_410M | {"eos_token_id": value}).eos_token_ids == expected


def test_end_tokens_are_below_two_to_the_31():
    assert spec(PYTHIA_410M | {"eos_token_id": [2**31 - 1]}).eos_token_ids == (2**31 - 1,)
    for beyond in (2**31, -1, True):
        with pytest.raises(dijiang.CheckpointError, match=r"eos_token_id is .*, expected token ids"):
            spec(PYTHIA_410M | {"eos_token_id": [beyond]})


def test_spec_survives_its_json_form():
    found = spec(PYTHIA_410M | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert dijiang.ModelSpec.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_length_dependent_rope_scaling_is_refused(edit_config, kind):
    folder = edit_config("neox-base", rope_scaling={"type": kind, "factor": 2.0})
    with pytest.raises(dijiang.CheckpointError, match=f"rope scaling '{kind}', expected linear or llama3"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported, expected one of gpt_neox, llama, opt",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"num_attention_heads": 7}, r"hidden_size \d+ is not divisible by num_attention_heads 7"),
        ({"num_attention_heads": 0}, "num_heads is 0, expected more than 0"),
        ({"num_hidden_layers": -1}, "num_layers is -1, expected more than 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected int"),
        ({"hidden_size": None}, "hidden_size is None, expected int"),
        ({"rotary_pct": 2.0}, "expected an even number up to the head size"),
        ({"rotary_pct": "some"}, "expected a finite number"),
        ({"use_parallel_residual": "yes"}, "use_parallel_residual is 'yes', expected true or false"),
        ({"layer_norm_eps": []}, "expected a finite number"),
        ({"rope_scaling": {"type": "linear"}}, "no key 'factor'"),
        ({"quantization_config": {"bits": 4}}, "a quantized checkpoint .*, expected float weights"),
    ],
)
def test_config_that_does_not_fit_is_one_error(edit_config, changes, message):
    with pytest.raises(dijiang.CheckpointError, match=message):
        load_checkpoint(edit_config("neox-base", **changes))
