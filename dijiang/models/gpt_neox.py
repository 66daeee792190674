"""GPT-NeoX (Pythia 70M-2.8B): config keys and tensor names of the published layout."""

from __future__ import annotations

from functools import partial
from typing import Any

from .activations import read_activation
from .binding import Array, Binding, Bindings, added, layered, linear, norm, plain
from .config import common_fields, flag, number
from .rotary import read_rope
from .spec import ModelSpec

#: Buffers that older transformers versions saved; they carry nothing.
IGNORED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def spec(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec from transformers' GPTNeoXConfig as JSON."""
    common = common_fields(config)
    heads = common["num_heads"]
    rope = read_rope(config, "rotary_emb_base", "rotary_pct")
    return ModelSpec(
        family="gpt_neox",
        **common,
        num_kv_heads=heads,
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        activation=read_activation(config, "hidden_act", "gelu"),
        parallel_residual=flag(config, "use_parallel_residual", default=True),
        rotary_dims=int((common["hidden_size"] // max(heads, 1)) * rope.share),
        rotary_base=rope.base,
        rope_scaling=rope.scaling,
        tied_embeddings=flag(config, "tie_word_embeddings", default=False),
        attention_bias=flag(config, "attention_bias", default=True),
    )


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the rotary keys as the published modelling code reads them."""
    rope = read_rope(config, "rotary_emb_base", "rotary_pct")
    return config | {"rotary_pct": rope.share, "rotary_emb_base": rope.base}


def _qkv_columns(tensor: Array, *, heads: int) -> Array:
    """[head][q|k|v] of K rows each -> [q|k|v][head]; weights become [in, out]."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    size = rows // (3 * heads)
    ordered = tensor.reshape(heads, 3, size, *rest).swapaxes(0, 1).reshape(rows, *rest)
    return ordered.T if rest else ordered


def bindings(spec: ModelSpec) -> Bindings:
    """Canonical weight name -> tensors of the published layout."""
    d, ff, vocab = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    columns = partial(_qkv_columns, heads=spec.num_heads)
    head = "gpt_neox.embed_in" if spec.tied_embeddings else "embed_out"
    model = {
        **plain("embed.weight", "gpt_neox.embed_in.weight", (vocab, d)),
        **norm("final_norm", "gpt_neox.final_layer_norm", spec),
        **linear("head", [(head, vocab)], d, bias=False),
    }
    layer = {
        **norm("attn_norm", "input_layernorm", spec),
        **norm("mlp_norm", "post_attention_layernorm", spec),
        "qkv.weight": (Binding("attention.query_key_value.weight", (3 * d, d), columns),),
        **linear("out", [("attention.dense", d)], d, bias=spec.attention_bias),
        **linear("mlp_up", [("mlp.dense_h_to_4h", ff)], d, bias=True),
        **linear("mlp_down", [("mlp.dense_4h_to_h", d)], ff, bias=True),
        **added("attention", spec),
    }
    if spec.attention_bias:
        layer["qkv.bias"] = (Binding("attention.query_key_value.bias", (3 * d,), columns),)
    return layered(model, layer, "gpt_neox.layers.", spec.num_layers)
