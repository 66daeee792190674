"""The published shapes, as config.json of transformers spells them, and what they weigh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..recipe import PRECISIONS, TYPE_BYTES, Blocks, Precision, embedding_blocks
from .binding import Bindings, shapes
from .load import FAMILIES
from .weights import is_decay_table


def _pythia(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _llama(hidden: int, ff: int, layers: int, heads: int, groups: int, positions: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": positions,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


_OPT_350M = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 1024,
    "word_embed_proj_dim": 512,
    "ffn_dim": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": False,
    "activation_function": "relu",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

#: Name -> config. Sizes from the models' published configs.
PRESETS: dict[str, dict[str, Any]] = {
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "opt-350m": _OPT_350M,
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 2048),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 4096),
}


@dataclass(frozen=True)
class Size:
    """What a preset weighs.

    parameters: D1 and D2 left out.  state_bytes: of one sequence, at any length.  weight_bytes: of all parameters
    as `export` stores them, by precision, within some percent: tables, graphs and tokenizer are
    not counted.
    """

    preset: str
    parameters: int
    state_bytes: int
    weight_bytes: dict[str, int]


def size(preset: str) -> Size:
    """Size of a preset, from its shapes alone."""
    family = FAMILIES[PRESETS[preset]["model_type"]]
    spec = family.spec(PRESETS[preset])
    bindings = family.bindings(spec)
    tensors = shapes(bindings)
    count = sum(math.prod(shape) for name, shape in tensors.items() if not is_decay_table(name))
    weights = {name: round(_stored(bindings, row, count)) for name, row in PRECISIONS.items()}
    return Size(preset, count, spec.state_bytes, weights)


def _stored(bindings: Bindings, row: Precision, count: int) -> float:
    """Bytes of all weights of a model of `count` parameters, in one precision."""
    embed, found = bindings["embed.weight"], 0.0
    tied = bindings.get("head.weight", embed)[0].source == embed[0].source
    for name, parts in bindings.items():
        if name != "head.weight" or not tied:  # else it is the embedding
            numbers = sum(math.prod(part.shape) for part in parts if not is_decay_table(part.source))
            blocks = None if len(parts[0].shape) < 2 else _blocks(name, row, numbers / count, tied=tied)
            copies = 2 if tied and name == "embed.weight" and blocks is None else 1  # rows and columns
            found += copies * numbers * (TYPE_BYTES[row.type] if blocks is None else blocks.weight_bytes)
    return found


def _blocks(name: str, row: Precision, share: float, *, tied: bool) -> Blocks | None:
    """How a matrix is stored that has a share of all parameters; None: in the precision's type."""
    if name.endswith(".proj.weight"):
        return None
    if name not in ("head.weight", "embed.weight"):
        return row.body
    if name == "head.weight" or tied:
        return row.head
    return embedding_blocks(row.embed, share)
