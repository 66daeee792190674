"""Small random checkpoints of every family and variant, drawn by hypothesis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dijiang.models.activations import ACTIVATIONS
from dijiang.models.binding import shapes
from dijiang.models.decay import initial_gamma
from dijiang.models.load import FAMILIES, load_checkpoint
from dijiang.models.reference import Reference
from dijiang.recipe import FLOAT32_FACTOR

#: max_position_embeddings of every drawn model.
POSITIONS = 40
FLAGS = st.booleans()
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@st.composite
def gpt_neox(draw) -> dict[str, Any]:
    heads, size = draw(st.integers(1, 5)), draw(st.sampled_from([4, 6, 7, 16]))
    rotated = draw(st.integers(0, size // 2)) * 2
    return {
        "model_type": "gpt_neox",
        "hidden_size": heads * size,
        "intermediate_size": draw(st.integers(1, 70)),
        "num_attention_heads": heads,
        "rotary_pct": min(1.0, (rotated + 0.5) / size),
        "use_parallel_residual": draw(FLAGS),
        "tie_word_embeddings": draw(FLAGS),
        "attention_bias": draw(FLAGS),
        "hidden_act": draw(st.sampled_from(sorted(ACTIVATIONS))),
    }


@st.composite
def llama(draw) -> dict[str, Any]:
    groups, shared = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 8]))
    heads, size = groups * shared, draw(st.sampled_from([2, 6, 16]))
    return {
        "model_type": "llama",
        "hidden_size": heads * size,
        "intermediate_size": draw(st.integers(1, 70)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(FLAGS),
        "attention_bias": draw(FLAGS),
        "mlp_bias": draw(FLAGS),
        "hidden_act": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
        "rope_scaling": draw(st.sampled_from([None, {"type": "linear", "factor": 3.0}, LLAMA3])),
    }


@st.composite
def opt(draw) -> dict[str, Any]:
    # At least two channels: onnxruntime 1.23 refuses a LayerNormalization over one.
    heads, size = draw(st.integers(1, 5)), draw(st.sampled_from([1, 5, 16]))
    heads = max(heads, 2 // size)
    return {
        "model_type": "opt",
        "hidden_size": heads * size,
        "word_embed_proj_dim": draw(st.sampled_from([heads * size, 7])),
        "ffn_dim": draw(st.integers(1, 70)),
        "num_attention_heads": heads,
        "do_layer_norm_before": draw(FLAGS),
        "_remove_final_layer_norm": draw(FLAGS),
        "enable_bias": draw(FLAGS),
        "activation_function": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "tie_word_embeddings": draw(FLAGS),
    }


#: By `model_type`: each family of the package.
STRATEGIES = {"gpt_neox": gpt_neox, "llama": llama, "opt": opt}
assert STRATEGIES.keys() == FAMILIES.keys(), "a family whose numbers no test would see"


@st.composite
def configs(draw) -> dict[str, Any]:
    """config.json of any family."""
    return draw(st.one_of(*[strategy() for strategy in STRATEGIES.values()])) | {
        "vocab_size": draw(st.sampled_from([1, 63, 131])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": POSITIONS,
    }


def write(folder: Path, config: dict[str, Any], *, trained: bool = False, seed: int = 0) -> Path:
    """A checkpoint whose every tensor is random; D1 and D2 analytic, or noisy if `trained`."""
    family = FAMILIES[config["model_type"]]
    random = np.random.default_rng(seed)
    tensors = {
        name: _value(name, shape, random, trained=trained)
        for name, shape in shapes(family.bindings(family.spec(config))).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _value(name: str, shape: tuple[int, ...], random: np.random.Generator, *, trained: bool):
    if name.endswith((".D1", ".D2")):
        sign = 1 if name.endswith("1") else -1
        powers = initial_gamma(shape[1])[:, None] ** (sign * np.arange(shape[2]))
        noise = random.normal(1, 0.5, powers.shape) if trained else 1
        return (powers * noise).reshape(shape).astype(np.float32)
    noise = random.standard_normal(shape) / shape[-1] ** 0.5
    if name.endswith("norm.weight"):
        noise = 1 + random.standard_normal(shape) / 4
    if name.endswith("proj_matrix"):
        noise = random.standard_normal(shape)
    return noise.astype(np.float32)


def float32_gate(folder: Path, ids: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of logits that float32 explains, as the gate of an fp32 export says (ADR 0019).

    ids [B, T], expected [B, T, vocab]: logits of the reference in float64.
    """
    plain = Reference(load_checkpoint(folder), np.float32).forward(ids)
    return FLOAT32_FACTOR * max(
        float(np.abs(plain - expected).max()), 1e-6 * max(1.0, float(np.abs(expected).max()))
    )
