"""PyTorch sides of benchmarks/gpu.py: transformers' vanilla GPT-NeoX, and an eager DiJiang step.

The vanilla model has random weights of the same shape. hf-eager: DynamicCache, as `generate` uses it
by default. hf-static: StaticCache. hf-graph: the same step as one captured CUDA graph. hf-compile: the
same under torch.compile, mode "reduce-overhead".
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import Place
from torch import Tensor
from torch.nn import functional as F

from dijiang.models.load import load_checkpoint
from dijiang.models.rotary import inverse_frequencies

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: Tokens in the cache when a sample ends: the paper's length; and that of a dry run.
LENGTH, SHORT = 2048, 128
Step = Callable[[], None]


@torch.inference_mode()
def measure(kind: str, place: Place) -> dict[str, Any]:
    """Seconds a greedy step of one side, by length."""
    device = "cpu" if place.dry_run else "cuda"
    if kind == "hf-graph" and device == "cpu":
        return {"skipped": "CUDA graphs need a GPU"}
    found: dict[str, Any] = {"torch": torch.__version__, "device": device}
    length, samples = SHORT if place.dry_run else LENGTH, []
    rewind, step = MAKERS[kind](place, length - place.steps, device)
    for _ in range(place.repeats + 1):
        rewind()
        _wait(device)
        started = time.perf_counter()
        for _ in range(place.steps):
            step()
        _wait(device)
        samples.append((time.perf_counter() - started) / place.steps)
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found | {"lengths": {str(length): samples[1:]}}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _vanilla(place: Place, device: str) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    names = ("architectures", "torch_dtype", "model_type")
    settings = {key: value for key, value in place.config.items() if key not in names}
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**settings))
    return model.to(DTYPES[place.precision]).eval()


def _keyword(model: Any) -> str:
    """What transformers calls the cache: the name changed in version 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _dynamic(place: Place, depth: int, device: str) -> tuple[Step, Step]:
    from transformers import DynamicCache

    model = _vanilla(place, device)
    prompt = torch.randint(place.config["vocab_size"], (1, depth), device=device)
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    name, cache = _keyword(model), {}

    def rewind() -> None:
        cache[name] = DynamicCache(config=model.config)
        model(prompt, use_cache=True, logits_to_keep=1, **cache)

    def step() -> None:
        logits = model(token, use_cache=True, **cache).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    return rewind, step


def _static(
    place: Place, depth: int, device: str, wrap: Callable[[Step], Step] = lambda step: step
) -> tuple[Step, Step]:
    from transformers import StaticCache

    model = _vanilla(place, device)
    prompt = torch.randint(place.config["vocab_size"], (1, depth), device=device)
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    cache = StaticCache(config=model.config, max_cache_len=depth + place.steps)
    named = {_keyword(model): cache}
    model(prompt, use_cache=True, logits_to_keep=1, **named)

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(depth)

    def step() -> None:
        logits = model(token, use_cache=True, **named).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    wrapped = wrap(step)
    rewind()
    return rewind, wrapped


def _graph(place: Place, depth: int, device: str) -> tuple[Step, Step]:
    return _static(place, depth, device, _captured)


def _captured(step: Step) -> Step:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Step = graph.replay
    return replay


def _compiled(place: Place, depth: int, device: str) -> tuple[Step, Step]:
    def wrap(step: Step) -> Step:
        for cell in step.__closure__ or ():  # a mutated input keeps reduce-overhead from CUDA graphs
            if isinstance(cell.cell_contents, Tensor):
                torch._dynamo.mark_static_address(cell.cell_contents)
        compiled: Step = torch.compile(step, mode="reduce-overhead")
        for _ in range(3):
            compiled()
        return compiled

    return _static(place, depth, device, wrap)


class Eager:
    """The recurrent step of a GPT-NeoX DiJiang model, one PyTorch call after the other."""

    def __init__(self, place: Place, device: str) -> None:
        model = load_checkpoint(place.checkpoint)
        self.spec, dtype = model.spec, DTYPES[place.precision]
        self._w = {
            name: torch.from_numpy(model.weights[name]).to(device, torch.float32 if "proj" in name else dtype)
            for name in model.weights
            if not name.endswith((".D1", ".D2"))
        }
        self._gamma = [torch.from_numpy(d.gamma).float().to(device)[:, None, None] for d in model.decays]
        self._frequencies = torch.from_numpy(inverse_frequencies(self.spec)).float().to(device)
        shape = (self.spec.num_layers, *self.spec.state_shape)
        self.state = torch.zeros(shape, device=device)
        self.position = torch.zeros((), device=device)
        self.token = torch.zeros(1, dtype=torch.long, device=device)

    def step(self) -> None:
        """One greedy token."""
        x = self._w["embed.weight"][self.token]
        angles = self.position * self._frequencies
        for layer in range(self.spec.num_layers):
            prefix = f"layers.{layer}"
            attended = self._attention(layer, prefix, self._norm(f"{prefix}.attn_norm", x), angles)
            up = self._linear(f"{prefix}.mlp_up", self._norm(f"{prefix}.mlp_norm", x))
            x = x + attended + self._linear(f"{prefix}.mlp_down", F.gelu(up))
        logits = self._linear("head", self._norm("final_norm", x))
        self.token.copy_(logits.argmax(-1))
        self.position += 1

    def _attention(self, layer: int, prefix: str, x: Tensor, angles: Tensor) -> Tensor:
        heads, size = self.spec.num_heads, self.spec.head_size
        q, k, v = self._linear(f"{prefix}.qkv", x).float().view(3, heads, size)
        half = self.spec.rotary_dims // 2
        qk = torch.stack([q, k])
        first, second, rest = qk.split([half, half, size - 2 * half], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        qk = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        q, k = (qk @ self._w[f"{prefix}.proj.weight"]).softmax(-1)
        state = self.state[layer]
        state.mul_(self._gamma[layer]).add_(k[:, :, None] * v[:, None, :])
        out = (q[:, :, None] * state).sum(1).reshape(1, -1)
        norm = f"{prefix}.group_norm"
        weight, bias = self._w[f"{norm}.weight"].float(), self._w[f"{norm}.bias"].float()
        out = F.group_norm(out, size, weight, bias, self.spec.group_norm_eps).to(x.dtype)
        gate = F.silu(x @ self._w[f"{prefix}.gate.weight"])
        return self._linear(f"{prefix}.out", gate * out)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self._w[f"{name}.weight"]
        bias = self._w.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._w[f"{name}.weight"], self._w[f"{name}.bias"]
        return F.layer_norm(x, (self.spec.hidden_size,), weight, bias, self.spec.norm_eps)


def _dijiang(place: Place, depth: int, device: str) -> tuple[Step, Step]:
    model = Eager(place, device)
    return (lambda: model.position.fill_(depth), model.step)


MAKERS: dict[str, Callable[[Place, int, str], tuple[Step, Step]]] = {
    "hf-eager": _dynamic,
    "hf-static": _static,
    "hf-graph": _graph,
    "hf-compile": _compiled,
    "torch-dijiang": _dijiang,
}
