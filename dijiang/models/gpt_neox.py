"""GPT-NeoX (Pythia 70M-2.8B): config keys and tensor names of the published layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from .config import token_ids, want
from .rotary import read_scaling
from .spec import ModelSpec
from .weights import Array, Binding

#: Buffers that older transformers versions saved; they carry nothing.
IGNORED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def spec(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec from transformers' GPTNeoXConfig as JSON."""
    hidden = want(config, "hidden_size", int)
    heads = want(config, "num_attention_heads", int)
    rope = config.get("rope_parameters") or {}
    rotary_pct = config.get("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    return ModelSpec(
        family="gpt_neox",
        vocab_size=want(config, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=want(config, "intermediate_size", int),
        num_layers=want(config, "num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=heads,
        max_positions=want(config, "max_position_embeddings", int),
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        activation=config.get("hidden_act", "gelu"),
        parallel_residual=bool(config.get("use_parallel_residual", True)),
        rotary_dims=int((hidden // max(heads, 1)) * rotary_pct),
        rotary_base=float(config.get("rotary_emb_base", rope.get("rope_theta", 10000.0))),
        rope_scaling=read_scaling(config.get("rope_scaling") or config.get("rope_parameters")),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", True)),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=token_ids(config.get("eos_token_id")),
    )


def _transposed(tensor: Array) -> Array:
    return tensor.T


def _table(tensor: Array) -> Array:
    return tensor[0, :, :, 0]


def _qkv_columns(tensor: Array, *, heads: int) -> Array:
    """[head][q|k|v] of K rows each -> [q|k|v][head]; weights become [in, out]."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    size = rows // (3 * heads)
    ordered = np.moveaxis(tensor.reshape(heads, 3, size, *rest), 1, 0).reshape(rows, *rest)
    return ordered.T


def bindings(spec: ModelSpec) -> dict[str, Binding]:
    """Canonical weight name -> tensor of the published layout."""
    d, ff, size, heads = spec.hidden_size, spec.intermediate_size, spec.head_size, spec.num_heads
    columns = partial(_qkv_columns, heads=heads)
    head = "gpt_neox.embed_in.weight" if spec.tied_embeddings else "embed_out.weight"
    table = {
        "embed.weight": Binding("gpt_neox.embed_in.weight", (spec.vocab_size, d)),
        "final_norm.weight": Binding("gpt_neox.final_layer_norm.weight", (d,)),
        "final_norm.bias": Binding("gpt_neox.final_layer_norm.bias", (d,)),
        "head.weight": Binding(head, (spec.vocab_size, d), _transposed),
    }
    layer = {
        "attn_norm.weight": Binding("input_layernorm.weight", (d,)),
        "attn_norm.bias": Binding("input_layernorm.bias", (d,)),
        "mlp_norm.weight": Binding("post_attention_layernorm.weight", (d,)),
        "mlp_norm.bias": Binding("post_attention_layernorm.bias", (d,)),
        "qkv.weight": Binding("attention.query_key_value.weight", (3 * d, d), columns),
        "gate.weight": Binding("attention.W_G", (d, d)),
        "proj.weight": Binding("attention.proj_matrix", (size, size)),
        "D1": Binding("attention.D1", (1, heads, spec.max_positions, 1), _table),
        "D2": Binding("attention.D2", (1, heads, spec.max_positions, 1), _table),
        "group_norm.weight": Binding("attention.group_norm.weight", (d,)),
        "group_norm.bias": Binding("attention.group_norm.bias", (d,)),
        "out.weight": Binding("attention.dense.weight", (d, d), _transposed),
        "mlp_up.weight": Binding("mlp.dense_h_to_4h.weight", (ff, d), _transposed),
        "mlp_up.bias": Binding("mlp.dense_h_to_4h.bias", (ff,)),
        "mlp_down.weight": Binding("mlp.dense_4h_to_h.weight", (d, ff), _transposed),
        "mlp_down.bias": Binding("mlp.dense_4h_to_h.bias", (d,)),
    }
    if spec.attention_bias:
        layer["qkv.bias"] = Binding("attention.query_key_value.bias", (3 * d,), columns)
        layer["out.bias"] = Binding("attention.dense.bias", (d,))
    for index in range(spec.num_layers):
        for name, binding in layer.items():
            source = f"gpt_neox.layers.{index}.{binding.source}"
            table[f"layers.{index}.{name}"] = replace(binding, source=source)
    return table
