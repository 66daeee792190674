"""The grammar: what a case may be."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

SHAPE = {"hidden_size": 16, "vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"max_position_embeddings": 24, "eos_token_id": 0, "bos_token_id": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 12, "rotary_pct": 0.5, "hidden_act": "gelu"},
    "opt": {"model_type": "opt", "ffn_dim": 12, "word_embed_proj_dim": 16, "activation_function": "relu"},
    "llama": {"model_type": "llama", "intermediate_size": 12, "num_key_value_heads": 1, "hidden_act": "silu"},
}
LAYOUTS = ("safetensors", "safetensors", "shards", "bin", "bin shards", "legacy bin")
CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"

Case = dict[str, Any]
Draw = random.Random


def value(draw: Draw, depth: int = 0) -> Any:
    """Any value of JSON, of the kinds that break readers."""
    kinds: list[Callable[[], Any]] = [
        lambda: draw.choice([0, 1, -1, 2, 3, 7, 16, 300, 2**31, -(2**31), 2**63, 10**30, 10**9]),
        lambda: draw.choice([0.0, -0.0, 0.5, 1e-320, 1e308, -2.5, 1e6, float("nan"), float("inf")]),
        lambda: draw.choice(["", "a", "gelu", "linear", "llama3", "default", "1", "\0", "é\ud800", "x" * 300]),
        lambda: draw.choice(["../x", "/etc/passwd", "\x1b[31m", "true", "model.safetensors", "auto", "."]),
        lambda: draw.choice([True, False, None]),
    ]
    if depth < 3:
        kinds += [
            lambda: [value(draw, depth + 1) for _ in range(draw.randrange(4))],
            lambda: {draw.choice(KEYS): value(draw, depth + 1) for _ in range(draw.randrange(4))},
        ]
    return draw.choice(kinds)()


KEYS = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "ffn_dim", "max_position_embeddings", "word_embed_proj_dim", "head_dim", "model_type"),
    *("hidden_act", "activation_function", "rope_scaling", "rope_parameters", "rope_theta", "rotary_pct"),
    *("partial_rotary_factor", "rotary_emb_base", "original_max_position_embeddings", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "enable_bias", "do_layer_norm_before", "layer_norm_eps", "rms_norm_eps"),
    *("eos_token_id", "bos_token_id", "quantization_config", "torch_dtype", "dtype", "use_parallel_residual"),
    *("type", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "quant_method", "text_config"),
    *("layer_norm_elementwise_affine", "_remove_final_layer_norm", "architectures", "auto_map", ""),
)
SAMPLING = ("eos_token_id", "temperature", "top_p", "top_k", "do_sample")
MODEL_KEYS = ("type", "vocab", "merges", "byte_fallback")
STORED = ("F8_E4M3", "I64", "F32", "F4", "BOOL", "BF16")
TOKENIZER_KEYS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens", "model", "truncation")
PARTS = (
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b" * 1000},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "Split", "pattern": {"Regex": "(x|x)*y"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": [], "processors": []},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]},
    {"type": "Strip", "strip_left": True, "strip_right": True, "content": " ", "start": 1, "stop": 10**9},
    {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
    {"type": "WordLevel", "vocab": {"a": 2**32}, "unk_token": "b"},
    {"type": "None"},
)
RAW = ("digits", "lists", "objects", "1e400", "-Infinity", "nothing", "bytes", "twice")
BYTES = ("00", "ff", "7f", "80", "fffffffffffffff7f", "00000000000000ff", "7b7b7b7b", "ffffffff", "2e2e2f", "5d7d")
OTHERS = ("directory", "pipe", "loop", "nowhere", "zero", "empty", "pointer", "unreadable")
NAMES = ("lm_head.weight", "embed_out.weight", "x", "", "\x1b]0;x\x07", "n" * 300, "model.norm.weight")
SHAPES = ([], [0], [1], [16], [16, 16], [300, 16], [1, 1, 24, 1], [2, 3, 4])
DTYPES = ("float16", "float64", "bfloat16", "float8_e4m3fn", "int8", "int64", "bool", "complex64")
PREFIXES = ("module.", "_orig_mod.", "model.", "base_model.model.", "x.", "model.model.")
WRAPS = ("state_dict", "module", "two", "number", "list", "none", "sparse", "quantized", "object", "strided")


def edit(draw: Draw, layout: str) -> list[Any]:
    """One edit of a checkpoint."""
    files = [CONFIG, TOKENIZER, GENERATION, VOCABULARY, MERGES, "@weights", "@weights", "@index"]
    place = draw.choice([draw.randrange(64), draw.randrange(600), -draw.randrange(1, 400), draw.randrange(40_000)])
    file = draw.choice(files)
    one: list[Callable[[], list[Any]]] = [
        lambda: ["set", CONFIG, [draw.choice(KEYS)], value(draw)],
        lambda: ["set", CONFIG, [draw.choice(KEYS)], value(draw)],
        lambda: ["unset", CONFIG, draw.randrange(20)],
        lambda: ["raw", draw.choice([CONFIG, TOKENIZER, GENERATION, "@index"]), draw.choice(RAW)],
        lambda: [
            "set",
            GENERATION,
            [draw.choice(["eos_token_id", "temperature", "top_p", "do_sample"])],
            value(draw),
        ],
        lambda: ["set", "@index", ["weight_map", draw.randrange(30)], value(draw)],
        lambda: ["set", "@index", [draw.choice(["weight_map", "metadata"])], value(draw)],
        lambda: ["set", TOKENIZER, [draw.choice(TOKENIZER_KEYS)], draw.choice([value(draw), draw.choice(PARTS)])],
        lambda: [
            "set",
            TOKENIZER,
            ["model", draw.choice(["type", "vocab", "merges", "byte_fallback"])],
            value(draw),
        ],
        lambda: ["bytes", file, place, draw.choice(BYTES)],
        lambda: ["bytes", file, place, bytes([draw.randrange(256)]).hex()],
        lambda: ["insert", file, place, draw.choice(BYTES)],
        lambda: ["cut", file, place],
        lambda: ["remove", file],
        lambda: ["other", file, draw.choice(OTHERS)],
        lambda: ["header", draw.randrange(40), draw.choice(["dtype", "shape", "data_offsets", ""]), value(draw)],
        lambda: [
            "header",
            draw.randrange(40),
            "dtype",
            draw.choice(["F8_E4M3", "I64", "F32", "F4", "BOOL", "BF16"]),
        ],
        lambda: ["header", draw.randrange(40), "data_offsets", [draw.randrange(9000), draw.choice([0, 64, 2**62])]],
        lambda: ["length", draw.choice([0, 1, 8, 10**6, 2**32, 2**63, 2**64 - 1])],
        lambda: ["name", draw.randrange(40), draw.choice(NAMES)],
        lambda: ["drop", draw.randrange(40)],
        lambda: ["add", draw.choice(NAMES), draw.choice(SHAPES)],
        lambda: ["dtype", draw.randrange(40), draw.choice(DTYPES)],
        lambda: ["shape", draw.randrange(40), draw.choice(SHAPES)],
        lambda: ["fill", draw.randrange(40), draw.choice([float("nan"), float("inf"), 1e38, 0.0, -1.0])],
        lambda: ["prefix", draw.choice(PREFIXES)],
    ]
    if "bin" in layout:
        one += [lambda: ["wrap", draw.choice(WRAPS)]] * 3
    return draw.choice(one)()


def draw_case(seed: int, number: int) -> Case:
    """The case of a number; most have one edit, so that a reader gets far before it meets it."""
    draw = random.Random(f"{seed} {number}")
    layout = draw.choice(LAYOUTS)
    return {
        "family": draw.choice(list(CONFIGS)),
        "verb": draw.choice(["export", "convert"]),
        "layout": layout,
        "graph": draw.choice(["auto", "primitive"]),
        "precision": draw.choice(["fp32", "fp32", "fp16", "int8", "int4"]),
        "verify": draw.random() < 0.1,
        "merges": draw.random() < 0.2,
        "edits": [edit(draw, layout) for _ in range(draw.choice([0, 1, 1, 1, 1, 1, 2, 3]) or draw.randrange(2))],
    }
