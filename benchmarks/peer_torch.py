"""PyTorch peers: transformers' GPT-NeoX with its KV cache, and DiJiang's full forward as published."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Transformers:
    """A vanilla GPT-NeoX with random weights and a DynamicCache, as `generate` uses it.

    The cache is filled with random keys and values: a step costs the same whatever they hold, and a
    computed prompt of thousands of tokens would take minutes.
    """

    def __init__(self, config: dict[str, Any], threads: int, precision: str) -> None:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        names = ("architectures", "torch_dtype", "model_type")
        settings = {key: value for key, value in config.items() if key not in names}
        self._config = GPTNeoXConfig(**settings)
        self._dtype = DTYPES[precision]
        self._model = GPTNeoXForCausalLM(self._config).to(self._dtype).eval()

    @torch.inference_mode()
    def prefill(self, tokens: int, repeat: int) -> list[float]:
        """Seconds for a prompt of `tokens`, `repeat` times."""
        ids = torch.randint(self._config.vocab_size, (1, tokens))
        samples = []
        for _ in range(repeat):
            started = time.perf_counter()
            self._model(ids, use_cache=True, logits_to_keep=1)
            samples.append(time.perf_counter() - started)
        return samples

    @torch.inference_mode()
    def decode(self, depth: int, tokens: int, repeat: int) -> list[float]:
        """Seconds for `tokens` greedy steps on a cache of `depth` tokens."""
        samples = []
        for _ in range(repeat):
            cache = self._cache(depth)
            token = torch.zeros((1, 1), dtype=torch.long)
            started = time.perf_counter()
            for _ in range(tokens):
                logits = self._model(token, cache=cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
            samples.append(time.perf_counter() - started)
        return samples

    def _cache(self, depth: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._config)
        heads = self._config.num_attention_heads
        shape = (1, heads, depth, self._config.hidden_size // heads)
        if depth:
            for layer in range(self._config.num_hidden_layers):
                keys, values = torch.randn(2, *shape, dtype=self._dtype)
                cache.update(keys, values, layer)
        return cache


class Published:
    """The published forward: every token costs a pass over the whole text, with a score of every pair.

    Written from the paper's equations and read from the checkpoint that our bundles are made of. Its own
    cached decoding applies the wrong decay and mask, so recomputing is the only right way to decode.
    """

    def __init__(self, checkpoint: Path, threads: int) -> None:
        from dijiang.models.load import load_checkpoint
        from dijiang.models.weights import is_decay_table

        torch.set_num_threads(threads)
        model = load_checkpoint(checkpoint)
        self.spec = model.spec
        self._w = {name: torch.from_numpy(model.weights[name]).float() for name in model.weights}
        for name in filter(is_decay_table, self._w):
            self._w[name] = self._w[name][:, :, None]
        frequencies = self.spec.rotary_base ** -(
            torch.arange(0, self.spec.rotary_dims, 2) / max(self.spec.rotary_dims, 1)
        )
        angles = torch.outer(torch.arange(self.spec.max_positions), frequencies).repeat(1, 2)
        self._cos, self._sin = angles.cos(), angles.sin()

    def prefill(self, tokens: int, repeat: int) -> list[float]:
        """Seconds for the forward of `tokens`, `repeat` times."""
        ids = torch.randint(self.spec.vocab_size, (1, tokens))
        samples = []
        for _ in range(repeat):
            started = time.perf_counter()
            self.forward(ids)
            samples.append(time.perf_counter() - started)
        return samples

    def decode(self, depth: int, tokens: int, repeat: int) -> list[float]:
        """Seconds for `tokens` greedy steps after `depth` tokens, the text growing by each."""
        samples = []
        for _ in range(repeat):
            ids = torch.randint(self.spec.vocab_size, (1, depth + 1))
            started = time.perf_counter()
            for _ in range(tokens):
                ids = torch.cat([ids, self.forward(ids)[:, -1:].argmax(-1)], dim=1)
            samples.append(time.perf_counter() - started)
        return samples

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, vocab] float32 of ids [B, T]; T up to the length of the D1/D2 tables."""
        x = self._w["embed.weight"][ids]
        for layer in range(self.spec.num_layers):
            prefix = f"layers.{layer}"
            attended = x + self._attention(prefix, self._norm(f"{prefix}.attn_norm", x))
            source = x if self.spec.parallel_residual else attended
            up = self._linear(f"{prefix}.mlp_up", self._norm(f"{prefix}.mlp_norm", source))
            x = attended + self._linear(f"{prefix}.mlp_down", F.gelu(up))
        return self._norm("final_norm", x) @ self._w["head.weight"]

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads, size = self.spec.num_heads, self.spec.head_size
        qkv = self._linear(f"{prefix}.qkv", x).view(batch, length, 3, heads, size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, K]
        q = self._features(prefix, "D1", q)
        k = self._features(prefix, "D2", k)
        out = (q @ k.transpose(2, 3)).tril() @ v
        flat = out.transpose(1, 2).reshape(batch * length, hidden)
        norm = f"{prefix}.group_norm"
        weight, bias = self._w[f"{norm}.weight"], self._w[f"{norm}.bias"]
        normed = F.group_norm(flat, size, weight, bias, self.spec.group_norm_eps)
        gate = F.silu(x @ self._w[f"{prefix}.gate.weight"])
        return self._linear(f"{prefix}.out", gate * normed.view_as(x))

    def _features(self, prefix: str, table: str, z: Tensor) -> Tensor:
        """D * softmax(rotary(z) P): [B, H, T, K]."""
        length, rotated = z.shape[2], self.spec.rotary_dims
        turn, keep = z[..., :rotated], z[..., rotated:]
        first, second = turn.chunk(2, dim=-1)
        half = torch.cat([-second, first], dim=-1)
        turn = turn * self._cos[:length] + half * self._sin[:length]
        scores = torch.cat([turn, keep], dim=-1) @ self._w[f"{prefix}.proj.weight"]
        return self._w[f"{prefix}.{table}"][:, :length] * scores.softmax(-1)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self._w[f"{name}.weight"] + self._w[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._w[f"{name}.weight"], self._w[f"{name}.bias"]
        return F.layer_norm(x, (self.spec.hidden_size,), weight, bias, self.spec.norm_eps)
