"""Fine-tune a converted checkpoint on text, by itself or by its vanilla teacher: a plain PyTorch loop.

    python examples/finetune.py TEXT --checkpoint CONVERTED -o OUTPUT --suffix .py --teacher VANILLA

TEXT is a folder of files, or a .jsonl file whose lines have a "text", which is read as it comes.

D1, D2 and the projection of the feature map stay as they are: with trained D1 and D2 positions would
end where their tables do, and decoding them exactly would need those tables.
"""

from __future__ import annotations

import argparse
import json
import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed
from training import Objective, arguments, check, cross_entropy, in_one_line, loss_of, read_text, run
from transformers.activations import ACT2FN

from dijiang.models.binding import shapes
from dijiang.models.checkpoint import UNTRAINED, Checkpoint
from dijiang.models.load import is_vanilla, load_checkpoint
from dijiang.models.rotary import inverse_frequencies
from dijiang.models.store import require_own, write_checkpoint
from dijiang.models.tokenizer import find_tokenizer
from dijiang.progress import silent
from dijiang.runtime.text import TextTokenizer

#: What training leaves alone, by the ends of the tensors' names.
FROZEN = (".D1", ".D2", ".proj_matrix")
#: Files of weights, by the ends of their names: those of the start are not the result's.
WEIGHTS = (".safetensors", ".bin", ".index.json")


class Dijiang(nn.Module):
    """A DiJiang checkpoint in the parallel form, for training; ids [B, T] -> logits [B, T, vocab].

    The parameters are the checkpoint's own tensors. What the forward pass needs is made of them by the
    family's bindings, so every family works and `state` gives back the tensors to save.

    recompute: layers are computed again in the backward pass, instead of kept in memory.
    """

    def __init__(self, checkpoint: Path, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        model = load_checkpoint(checkpoint)
        self.spec = spec = model.spec
        self.bindings = model.weights.bindings
        self.parts = nn.ParameterDict()
        for name in shapes(self.bindings):
            values = torch.from_numpy(model.checkpoint.read(name).astype(np.float32))
            self.parts[name.replace(".", "/")] = nn.Parameter(values, not name.endswith(FROZEN))
        # No buffers: whoever casts a module to 16 bits, or shards it, casts its buffers.
        self.frequencies = torch.from_numpy(inverse_frequencies(spec))
        self.gammas = torch.from_numpy(np.stack([decay.gamma for decay in model.decays]))
        #: D1 and D2 as they are saved, whatever the module is cast to. Those of 16 bits were rounded, and would be
        #: read as trained in float32: they are made anew.
        self.tables: dict[str, Tensor] = {}
        powers = torch.arange(spec.max_positions, dtype=torch.float64)
        for layer, (name, sign) in product(range(spec.num_layers), (("D1", 1), ("D2", -1))):
            (part,) = self.bindings[f"layers.{layer}.{name}"]
            table = self.parts[part.source.replace(".", "/")].detach().clone()
            if model.checkpoint.dtype(part.source).itemsize < 4:
                table = (self.gammas[layer][:, None] ** (sign * powers)).float()[None, ..., None]
            self.tables[part.source] = table
        if any(decay.kind != "analytic" for decay in model.decays):
            raise SystemExit(f"{checkpoint}: D1 and D2 were trained; start from dijiang convert")

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Canonical weights (see dijiang/models/weights.py) of a layer, or outside all layers."""
        found = {}
        for name, parts in self.bindings.items():
            inside = name.startswith(prefix) if prefix else not name.startswith("layers.")
            if inside and not name.endswith((".D1", ".D2")):
                tensors = [p.to_canonical(self.parts[p.source.replace(".", "/")]) for p in parts]
                found[name.removeprefix(prefix)] = tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)
        return found

    def state(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by name, in float32."""
        found = {name.replace("/", "."): tensor.detach().float().cpu() for name, tensor in self.parts.items()}
        return found | self.tables

    def forward(self, ids: Tensor) -> Tensor:
        spec, length = self.spec, ids.shape[1]
        w = self.weights("")
        x = F.embedding(ids, w["embed.weight"])
        if spec.embedding_size is not None:
            x = linear(w, "embed_in", x)
        if spec.learned_positions:
            x = x + w["positions.weight"][:length]
        turn = self.turn(length, x)
        block = partial(recomputed, self.layer, use_reentrant=False) if self.recompute else self.layer
        for layer in range(spec.num_layers):
            x = block(layer, x, turn)
        if spec.final_norm:
            x = self.norm(w, "final_norm", x)
        if spec.embedding_size is not None:
            x = linear(w, "embed_out", x)
        return linear(w, "head", x)

    def turn(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of the rotary angles, [T, 1, R/2] each, of the type and place of a tensor."""
        frequencies = self.frequencies.to(like.device)
        angles = torch.outer(torch.arange(length, dtype=frequencies.dtype, device=like.device), frequencies)
        return angles.cos().to(like.dtype)[:, None], angles.sin().to(like.dtype)[:, None]

    def layer(self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        w = self.weights(f"layers.{layer}.")
        if not self.spec.norm_first:
            x = self.norm(w, "attn_norm", x + self.attention(layer, w, x, turn))
            return self.norm(w, "mlp_norm", x + self.mlp(w, x))
        attended = x + self.attention(layer, w, self.norm(w, "attn_norm", x), turn)
        source = x if self.spec.parallel_residual else attended
        return attended + self.mlp(w, self.norm(w, "mlp_norm", source))

    def norm(self, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        weight, eps = w[f"{name}.weight"], self.spec.norm_eps
        if self.spec.norm == "rms":
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.layer_norm(x, weight.shape, weight, w[f"{name}.bias"], eps)

    def mlp(self, w: dict[str, Tensor], x: Tensor) -> Tensor:
        activation, up = ACT2FN[self.spec.activation], linear(w, "mlp_up", x)
        if self.spec.gated_mlp:
            return linear(w, "mlp_down", activation(linear(w, "mlp_gate", x)) * up)
        return linear(w, "mlp_down", activation(up))

    def attention(self, layer: int, w: dict[str, Tensor], x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """o_t = sum over s <= t of gamma^(t-s) (phi(q_t) . phi(k_s)) v_s, normed and gated."""
        spec = self.spec
        heads, groups, size = spec.num_heads, spec.num_kv_heads, spec.head_size
        qkv = linear(w, "qkv", x).unflatten(-1, (-1, size)).to(x.dtype)
        q, k, v = qkv.split([heads, groups, groups], dim=2)
        k, v = (z.repeat_interleave(heads // groups, dim=2) for z in (k, v))
        with torch.autocast(x.device.type, enabled=False):  # sums over all positions
            q, k = ((rotate(z, turn) @ w["proj.weight"]).softmax(-1) for z in (q, k))
            steps = torch.arange(x.shape[1], device=x.device)
            distance = (steps[:, None] - steps).clamp(min=0).to(self.gammas.dtype)
            decay = (self.gammas[layer].to(x.device)[:, None, None] ** distance).tril().to(x.dtype)
            scores = torch.einsum("bthk,bshk->bhts", q, k) * decay.repeat_interleave(heads // groups, dim=0)
            out = torch.einsum("bhts,bshv->bthv", scores, v).flatten(0, 1).flatten(1)
            norm = w["group_norm.weight"], w["group_norm.bias"]
            normed = F.group_norm(out, size, *norm, spec.group_norm_eps).view_as(x)
        return linear(w, "out", F.silu(linear(w, "gate", x)) * normed)


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Half-rotation of the leading channels; x [B, T, heads, K], turn: cos and sin [T, 1, R/2]."""
    cos, sin = turn
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class Teacher:
    """The vanilla model, and what goes into and comes out of each of its attention modules."""

    def __init__(self, vanilla: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        if not is_vanilla(Checkpoint(vanilla)):
            raise SystemExit(
                f"--teacher {vanilla}: a DiJiang checkpoint, expected the vanilla one that it was made of"
            )
        self.model = AutoModelForCausalLM.from_pretrained(vanilla, dtype=dtype).to(device).eval()
        self.vocab_size = self.model.config.vocab_size
        self.seen: list[tuple[Tensor, Tensor]] = []
        known = re.compile(r"\.\d+\.(attention|self_attn|attn)$")
        found = [module for name, module in self.model.named_modules() if known.search(name)]
        if len(found) != self.model.config.num_hidden_layers:
            raise SystemExit(f"{vanilla}: {len(found)} attention modules are known by name, expected one a layer")
        for module in found:
            module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.seen.append((args[0] if args else kwargs["hidden_states"], output[0]))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [B, T, vocab], and (input, output) [B, T, d] of every layer's attention."""
        self.seen = []
        return self.model(ids, use_cache=False).logits.float(), self.seen


def attention_loss(model: Dijiang, teacher: Teacher, batch: Tensor) -> Tensor:
    """How far each layer's attention is from the teacher's, on the teacher's own inputs: mean over layers of
    the squared error over the teacher's mean square.
    """
    losses = []
    for layer, (x, expected) in enumerate(teacher(batch[:, :-1])[1]):
        x, expected = x.float(), expected.float()
        found = model.attention(layer, model.weights(f"layers.{layer}."), x, model.turn(x.shape[1], x))
        losses.append((found.float() - expected).square().mean() / expected.square().mean())
    return torch.stack(losses).mean()


def logit_loss(model: nn.Module, teacher: Teacher, batch: Tensor, share: float) -> Tensor:
    """`share` of the divergence from the teacher's next tokens, the rest cross-entropy."""
    logits, target = model(batch[:, :-1]).float(), teacher(batch[:, :-1])[0]
    far = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    return share * far + (1 - share) * cross_entropy(logits, batch)


def objective(model: nn.Module, args: argparse.Namespace, teacher: Teacher | None) -> Objective:
    """First attention is made like the teacher's, then logits; without a teacher cross-entropy is made small."""
    if teacher is None:
        return lambda step, batch: loss_of(model, batch)
    aligned = round(args.align * args.steps)

    def loss(step: int, batch: Tensor) -> Tensor:
        if step <= aligned:
            return attention_loss(model, teacher, batch)
        return logit_loss(model, teacher, batch, args.teach)

    return loss


def carried(source: Path) -> list[Path]:
    """Files of a checkpoint that stay as they are; CheckpointError for a link to a file outside of it."""
    files = [file for file in source.iterdir() if file.is_file() and not file.name.endswith(WEIGHTS)]
    for file in files:
        require_own(file)
    return files


def save(model: Dijiang, source: Path, output: Path) -> None:
    """The trained tensors, in float32, as a checkpoint; everything else is the source's."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop(UNTRAINED, None)
    config |= {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    tensors = {name: tensor.numpy() for name, tensor in model.state().items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_checkpoint(output, config, tensors.items(), total, files=carried(source), progress=silent)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what dijiang convert wrote")
    parser.add_argument("--teacher", type=Path, help="the vanilla checkpoint: learn from it")
    parser.add_argument("--align", type=float, default=0.25, help="share of the steps for attention alone")
    parser.add_argument("--teach", type=float, default=0.5, help="the teacher's share in the loss of logits")
    parser.add_argument("--recompute", action="store_true", help="less memory, more time: gradient checkpointing")
    args = parser.parse_args()
    with in_one_line():
        finetune(args)


def finetune(args: argparse.Namespace) -> None:
    check(args)
    for name in ("align", "teach"):
        if not 0 <= getattr(args, name) <= 1:
            raise SystemExit(f"--{name} {getattr(args, name)}, expected a share: 0 to 1")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    model = Dijiang(args.checkpoint, recompute=args.recompute).to(device)
    carried(args.checkpoint)  # refused before hours of training, not after them
    room = model.spec.max_positions if model.spec.learned_positions else args.length
    if args.length > room:
        raise SystemExit(f"--length {args.length}, expected at most the {room} positions of {args.checkpoint}")
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    teacher = None if args.teacher is None else Teacher(args.teacher, device, dtype)
    if teacher is not None and teacher.vocab_size != model.spec.vocab_size:
        raise SystemExit(
            f"--teacher {args.teacher}: a vocabulary of {teacher.vocab_size}, that of {args.checkpoint} has "
            f"{model.spec.vocab_size}; give the model that it was converted from"
        )
    tokenizer = find_tokenizer(args.checkpoint, model.spec.vocab_size)
    if tokenizer is None:
        raise SystemExit(f"{args.checkpoint}: no tokenizer to read text with; add that of the vanilla checkpoint")
    batches, held_out = read_text(args, TextTokenizer(tokenizer, args.checkpoint).encode)
    run(model, batches, held_out, args, objective(model, args, teacher))
    save(model, args.checkpoint, args.output)


if __name__ == "__main__":
    main()
