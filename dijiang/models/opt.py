"""OPT (OPT-350M): config keys and tensor names.

The published code has no OPT: what DiJiang adds stands in `self_attn` under the names it has in
GPT-NeoX. OPT's query scale head_dim^-0.5 is gone with the softmax over positions that it served.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .activations import read_activation
from .binding import Binding, Bindings, added, layered, linear, norm, plain
from .config import common_fields, flag, want
from .spec import ModelSpec

#: Left by the original training code in some files; it carries nothing.
IGNORED = ("decoder.version",)
#: Rows of the position table that no position uses.
OFFSET = 2
DECODER = "model.decoder"


def spec(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec from transformers' OPTConfig as JSON."""
    if not flag(config, "layer_norm_elementwise_affine", default=True):
        raise CheckpointError(
            "config.json: layer_norm_elementwise_affine is false, expected true; "
            "an OPT without norm weights is not supported"
        )
    common = common_fields(config, intermediate="ffn_dim")
    projected = config.get("word_embed_proj_dim") not in (None, common["hidden_size"])
    norm_first = flag(config, "do_layer_norm_before", default=True)
    bias = flag(config, "enable_bias", default=True)
    return ModelSpec(
        family="opt",
        **common,
        num_kv_heads=common["num_heads"],
        norm_eps=1e-5,
        activation=read_activation(config, "activation_function", "relu"),
        parallel_residual=False,
        rotary_dims=0,
        rotary_base=10000.0,
        tied_embeddings=flag(config, "tie_word_embeddings", default=True),
        attention_bias=bias,
        mlp_bias=bias,
        norm_first=norm_first,
        final_norm=norm_first and not flag(config, "_remove_final_layer_norm", default=False),
        learned_positions=True,
        embedding_size=want(config, "word_embed_proj_dim", int) if projected else None,
    )


def bindings(spec: ModelSpec) -> Bindings:
    """Canonical weight name -> tensors of transformers' layout."""
    d, ff = spec.hidden_size, spec.intermediate_size
    layer = {
        **norm("attn_norm", "self_attn_layer_norm", spec),
        **norm("mlp_norm", "final_layer_norm", spec),
        **linear("qkv", [(f"self_attn.{x}_proj", d) for x in "qkv"], d, bias=spec.attention_bias),
        **linear("out", [("self_attn.out_proj", d)], d, bias=spec.attention_bias),
        **linear("mlp_up", [("fc1", ff)], d, bias=spec.mlp_bias),
        **linear("mlp_down", [("fc2", d)], ff, bias=spec.mlp_bias),
        **added("self_attn", spec),
    }
    return layered(_outside_layers(spec), layer, f"{DECODER}.layers.", spec.num_layers)


def _outside_layers(spec: ModelSpec) -> Bindings:
    d, vocab, size = spec.hidden_size, spec.vocab_size, spec.embedding_size or spec.hidden_size
    rows = (spec.max_positions + OFFSET, d)
    head = f"{DECODER}.embed_tokens" if spec.tied_embeddings else "lm_head"
    table = {
        **plain("embed.weight", f"{DECODER}.embed_tokens.weight", (vocab, size)),
        "positions.weight": (Binding(f"{DECODER}.embed_positions.weight", rows, lambda tensor: tensor[OFFSET:]),),
        **linear("head", [(head, vocab)], size, bias=False),
    }
    if spec.final_norm:
        table |= norm("final_norm", f"{DECODER}.final_layer_norm", spec)
    if spec.embedding_size is not None:
        table |= linear("embed_in", [(f"{DECODER}.project_in", d)], size, bias=False)
        table |= linear("embed_out", [(f"{DECODER}.project_out", size)], d, bias=False)
    return table
