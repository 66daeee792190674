"""PyTorch subjects: transformers' vanilla GPT-NeoX, and DiJiang as published and step by step.

They read the clock themselves, once a repetition: on a GPU the steps overlap with Python. Each class is
its own loader: (path of a checkpoint, threads, PyTorch's name of the device).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dijiang.bench.matrix import Test
from dijiang.bench.subject import Subject
from dijiang.errors import BenchError
from dijiang.models.load import load_checkpoint
from dijiang.models.rotary import inverse_frequencies
from dijiang.models.weights import is_decay_table

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: Calls before a CUDA graph is captured.
WARM = 3
Call = Callable[[], Any]


class TorchSubject(Subject):
    """make(test) -> (what prepares a repetition, what is timed)."""

    make: Callable[[Test], tuple[Call, Call]]

    def __init__(self, device: str, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = device
        self.provider = f"PyTorch {torch.__version__} {device}"

    @torch.inference_mode()
    def prepare(self, tests: Sequence[Test]) -> None:
        self._made = {test: self.make(test) for test in tests}

    @torch.inference_mode()
    def seconds(self, test: Test) -> list[float]:
        prepare, action = self._made[test]
        prepare()
        self._wait()
        started = time.perf_counter()
        action()
        self._wait()
        return [time.perf_counter() - started]

    def warm_up(self, test: Test) -> None:
        self.seconds(test)

    def peaks(self) -> dict[str, int | None]:
        """Bytes that PyTorch allocated on the GPU at most."""
        on_gpu = torch.cuda.is_initialized()
        return {"host": None, "device": torch.cuda.max_memory_allocated() if on_gpu else None}

    def _wait(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def _repeated(step: Call, count: int) -> Call:
    def steps() -> None:
        for _ in range(count):
            step()

    return steps


class Vanilla(TorchSubject):
    """A vanilla GPT-NeoX with random weights.

    dynamic: DynamicCache, as `generate` uses it by default, filled with random keys and values: a step
    costs the same whatever they hold.  static: StaticCache.  graph: the same step as one captured CUDA
    graph.  compile: the same under torch.compile, mode "reduce-overhead".
    """

    def __init__(
        self, path: str, threads: int | None, device: str, config: dict, precision: str, cache: str
    ) -> None:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        super().__init__(device, threads)
        self._wrap = {"graph": _captured, "compile": _compiled}.get(cache, lambda step: step)
        self._cached = self._dynamic if cache == "dynamic" else self._static
        if cache == "graph" and not torch.cuda.is_available():
            raise BenchError("CUDA graphs need a GPU; run it on one")
        names = ("architectures", "torch_dtype", "model_type")
        self._config = GPTNeoXConfig(**{k: v for k, v in config.items() if k not in names})
        torch.manual_seed(0)
        with torch.device(device):
            self._model = GPTNeoXForCausalLM(self._config).to(DTYPES[precision]).eval()
        # What transformers calls the cache: the name changed in version 5.
        parameters = inspect.signature(self._model.forward).parameters
        self._keyword = "cache" if "cache" in parameters else "past_key_values"

    def make(self, test: Test) -> tuple[Call, Call]:
        if test.prompt:
            ids = self._ids(test.tokens)
            return (lambda: None, lambda: self._model(ids, use_cache=True, logits_to_keep=1))
        rewind, step = self._cached(test)
        return rewind, _repeated(step, test.tokens)

    def _ids(self, tokens: int) -> Tensor:
        return torch.randint(self._config.vocab_size, (1, tokens), device=self.device)

    def _step(self, token: Tensor, cache: Any) -> None:
        logits = self._model(token, use_cache=True, **{self._keyword: cache}).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def _dynamic(self, test: Test) -> tuple[Call, Call]:
        from transformers import DynamicCache

        token, cache = torch.zeros_like(self._ids(1)), {}
        heads = self._config.num_attention_heads
        shape = (2, 1, heads, test.depth, self._config.hidden_size // heads)
        keys_values = torch.randn(shape, dtype=self._model.dtype, device=self.device)

        def rewind() -> None:
            cache[0] = DynamicCache(config=self._config)
            for layer in range(self._config.num_hidden_layers if test.depth else 0):
                cache[0].update(*keys_values.clone(), layer)

        return rewind, lambda: self._step(token, cache[0])

    def _static(self, test: Test) -> tuple[Call, Call]:
        from transformers import StaticCache

        token = torch.zeros_like(self._ids(1))
        cache = StaticCache(config=self._config, max_cache_len=test.end)
        prompt = self._ids(max(1, test.depth))
        self._model(prompt, use_cache=True, logits_to_keep=1, **{self._keyword: cache})

        def rewind() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(test.depth)

        def step() -> None:
            self._step(token, cache)

        wrapped = self._wrap(step)
        rewind()
        return rewind, wrapped


def _captured(step: Call) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _repeated(step, WARM)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _compiled(step: Call) -> Call:
    for cell in step.__closure__ or ():  # a mutated input keeps reduce-overhead from CUDA graphs
        if isinstance(cell.cell_contents, Tensor):
            torch._dynamo.mark_static_address(cell.cell_contents)
    compiled: Call = torch.compile(step, mode="reduce-overhead")
    _repeated(compiled, WARM)()
    return compiled


class TorchDijiang(TorchSubject):
    """A GPT-NeoX DiJiang model from its checkpoint, in plain PyTorch."""

    def __init__(self, path: str, threads: int | None, device: str, precision: str = "fp32") -> None:
        super().__init__(device, threads)
        model, dtype = load_checkpoint(path), DTYPES[precision]
        self.spec, self.decays = model.spec, model.decays
        self._w = {
            name: torch.from_numpy(model.weights[name]).to(
                device, torch.float32 if "proj" in name or is_decay_table(name) else dtype
            )
            for name in model.weights
        }
        self.frequencies = torch.from_numpy(inverse_frequencies(self.spec)).float().to(device)

    def logits(self, ids: Tensor) -> Tensor:
        """[..., vocab] of ids of any shape; `attention(layer, x)` is what a layer's attention adds."""
        x = self._w["embed.weight"][ids]
        for layer in range(self.spec.num_layers):
            attended = x + self.attention(layer, self._norm(f"layers.{layer}.attn_norm", x))
            x = attended + self._mlp(f"layers.{layer}", x if self.spec.parallel_residual else attended)
        return self._linear("head", self._norm("final_norm", x))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self._w[f"{name}.weight"]
        bias = self._w.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._w[f"{name}.weight"], self._w[f"{name}.bias"]
        return F.layer_norm(x, (self.spec.hidden_size,), weight, bias, self.spec.norm_eps)

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        up = self._linear(f"{prefix}.mlp_up", self._norm(f"{prefix}.mlp_norm", x))
        return self._linear(f"{prefix}.mlp_down", F.gelu(up))

    def _features(self, prefix: str, z: Tensor, angles: Tensor) -> Tensor:
        """softmax(rotary(z) P): [..., T, K] of z [..., T, K] and angles [T, rotary_dims / 2]."""
        half = self.spec.rotary_dims // 2
        first, second, rest = z.split([half, half, z.shape[-1] - 2 * half], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        return (turned @ self._w[f"{prefix}.proj.weight"]).softmax(-1)

    def _mixed(self, prefix: str, out: Tensor, x: Tensor) -> Tensor:
        """Group norm, gate and output of attention out [N, hidden]; x: its input, of any shape."""
        norm = f"{prefix}.group_norm"
        weight, bias = self._w[f"{norm}.weight"].float(), self._w[f"{norm}.bias"].float()
        normed = F.group_norm(out, self.spec.head_size, weight, bias, self.spec.group_norm_eps)
        gate = F.silu(x @ self._w[f"{prefix}.gate.weight"])
        return self._linear(f"{prefix}.out", gate * normed.view_as(x).to(x.dtype))


class Published(TorchDijiang):
    """The published forward: every token costs a pass over the whole text, with a score of every pair.

    Written from the paper's equations and read from the checkpoint that our bundles are made of. Its own
    cached decoding applies the wrong decay and mask, so recomputing is the only right way to decode.
    """

    def make(self, test: Test) -> tuple[Call, Call]:
        ids = torch.randint(self.spec.vocab_size, (1, test.tokens if test.prompt else test.depth + 1))

        def decode() -> None:
            text = ids
            for _ in range(test.tokens):
                text = torch.cat([text, self.forward(text)[:, -1:].argmax(-1)], dim=1)

        return (lambda: None, (lambda: self.forward(ids)) if test.prompt else decode)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, vocab] float32 of ids [B, T]; T up to the length of the D1/D2 tables."""
        return self.logits(ids)

    def attention(self, layer: int, x: Tensor) -> Tensor:
        prefix, (batch, length, hidden) = f"layers.{layer}", x.shape
        qkv = self._linear(f"{prefix}.qkv", x).view(batch, length, 3, self.spec.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, K]
        angles = torch.outer(torch.arange(length), self.frequencies)
        q, k = (
            self._w[f"{prefix}.{table}"][:, :length, None] * self._features(prefix, z, angles)
            for table, z in (("D1", q), ("D2", k))
        )
        out = (q @ k.transpose(2, 3)).tril() @ v
        return self._mixed(prefix, out.transpose(1, 2).reshape(batch * length, hidden), x)


class Eager(TorchDijiang):
    """The recurrent step, one PyTorch call after the other."""

    def __init__(self, path: str, threads: int | None, device: str, precision: str = "fp32") -> None:
        super().__init__(path, threads, device, precision)
        self._gamma = [torch.from_numpy(d.gamma).float().to(device)[:, None, None] for d in self.decays]
        self.state = torch.zeros((self.spec.num_layers, *self.spec.state_shape), device=device)
        self.position = torch.zeros((), device=device)
        self.token = torch.zeros(1, dtype=torch.long, device=device)

    def make(self, test: Test) -> tuple[Call, Call]:
        return (lambda: self.position.fill_(test.depth), _repeated(self.step, test.tokens))

    def step(self) -> None:
        """One greedy token."""
        self._angles = (self.position * self.frequencies)[None]
        self.token.copy_(self.logits(self.token).argmax(-1))
        self.position += 1

    def attention(self, layer: int, x: Tensor) -> Tensor:
        prefix = f"layers.{layer}"
        qkv = self._linear(f"{prefix}.qkv", x).float().view(3, self.spec.num_heads, self.spec.head_size)
        q, k = self._features(prefix, qkv[:2], self._angles)
        state = self.state[layer]
        state.mul_(self._gamma[layer]).add_(k[:, :, None] * qkv[2][:, None, :])
        return self._mixed(prefix, (q[:, :, None] * state).sum(1).reshape(1, -1), x)
