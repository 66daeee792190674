"""LLaMA (TinyLLaMA-1.1B, LLaMA2-7B): config keys and tensor names.

The published code has no LLaMA: what DiJiang adds stands in `self_attn` under the names it has in
GPT-NeoX. Grouped query heads share one state, one gamma and one row of D1/D2 per kv head.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .activations import read_activation
from .binding import Bindings, added, layered, linear, norm, plain
from .config import common_fields, flag, number, want
from .rotary import read_rope
from .spec import ModelSpec

#: A buffer that older transformers versions saved; it carries nothing.
IGNORED = (".rotary_emb.inv_freq",)


def spec(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec from transformers' LlamaConfig as JSON."""
    common = common_fields(config)
    heads = common["num_heads"]
    grouped = config.get("num_key_value_heads") is not None
    rope = read_rope(config, "rope_theta")
    found = ModelSpec(
        family="llama",
        **common,
        num_kv_heads=want(config, "num_key_value_heads", int) if grouped else heads,
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        activation=read_activation(config, "hidden_act", "silu"),
        parallel_residual=False,
        rotary_dims=common["hidden_size"] // max(heads, 1),
        rotary_base=rope.base,
        rope_scaling=rope.scaling,
        tied_embeddings=flag(config, "tie_word_embeddings", default=False),
        attention_bias=flag(config, "attention_bias", default=False),
        mlp_bias=flag(config, "mlp_bias", default=False),
        norm="rms",
        gated_mlp=True,
    )
    if config.get("head_dim") not in (None, found.head_size):
        raise CheckpointError(
            f"config.json: head_dim is {config['head_dim']!r}, expected hidden_size / "
            f"num_attention_heads = {found.head_size}: gate and group norm of a DiJiang block have "
            "hidden_size channels; use a model whose heads fill them"
        )
    return found


def bindings(spec: ModelSpec) -> Bindings:
    """Canonical weight name -> tensors of transformers' layout."""
    d, ff, vocab = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    kv = spec.num_kv_heads * spec.head_size
    qkv = [("self_attn.q_proj", d), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]
    head = "model.embed_tokens" if spec.tied_embeddings else "lm_head"
    model = {
        **plain("embed.weight", "model.embed_tokens.weight", (vocab, d)),
        **norm("final_norm", "model.norm", spec),
        **linear("head", [(head, vocab)], d, bias=False),
    }
    layer = {
        **norm("attn_norm", "input_layernorm", spec),
        **norm("mlp_norm", "post_attention_layernorm", spec),
        **linear("qkv", qkv, d, bias=spec.attention_bias),
        **linear("out", [("self_attn.o_proj", d)], d, bias=spec.attention_bias),
        **linear("mlp_gate", [("mlp.gate_proj", ff)], d, bias=spec.mlp_bias),
        **linear("mlp_up", [("mlp.up_proj", ff)], d, bias=spec.mlp_bias),
        **linear("mlp_down", [("mlp.down_proj", d)], ff, bias=spec.mlp_bias),
        **added("self_attn", spec),
    }
    return layered(model, layer, "model.layers.", spec.num_layers)
