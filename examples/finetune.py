"""Fine-tune a converted checkpoint on text, by itself or by its vanilla teacher: a plain PyTorch loop.

    python examples/finetune.py TEXT --checkpoint CONVERTED -o OUTPUT --suffix .py --teacher VANILLA

TEXT is a folder of files, or a .jsonl file whose lines have a "text", which is read as it comes.

D1, D2 and the projection of the feature map stay as they are: with trained D1 and D2 positions would
end where their tables do, and decoding them exactly would need those tables.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed
from transformers.activations import ACT2FN

from dijiang.models.binding import shapes
from dijiang.models.load import FAMILIES, load_checkpoint
from dijiang.models.rotary import inverse_frequencies

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
        self.bindings = FAMILIES[spec.family].bindings(spec)
        self.parts = nn.ParameterDict()
        for name in shapes(self.bindings):
            values = torch.from_numpy(model.checkpoint.read(name).astype(np.float32))
            self.parts[name.replace(".", "/")] = nn.Parameter(values, not name.endswith(FROZEN))
        frequencies = torch.from_numpy(inverse_frequencies(spec))
        self.register_buffer("frequencies", frequencies, persistent=False)
        gammas = np.stack([decay.gamma for decay in model.decays])
        self.register_buffer("gammas", torch.from_numpy(gammas), persistent=False)
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
        """The checkpoint's tensors by name."""
        return {name.replace("/", "."): tensor.detach() for name, tensor in self.parts.items()}

    def forward(self, ids: Tensor) -> Tensor:
        spec, length = self.spec, ids.shape[1]
        w = self.weights("")
        x = F.embedding(ids, w["embed.weight"])
        if spec.embedding_size is not None:
            x = linear(w, "embed_in", x)
        if spec.learned_positions:
            x = x + w["positions.weight"][:length]
        turn = self.turn(length, x.dtype)
        block = partial(recomputed, self.layer, use_reentrant=False) if self.recompute else self.layer
        for layer in range(spec.num_layers):
            x = block(layer, x, turn)
        if spec.final_norm:
            x = self.norm(w, "final_norm", x)
        if spec.embedding_size is not None:
            x = linear(w, "embed_out", x)
        return linear(w, "head", x)

    def turn(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cos and sin of the rotary angles, [T, 1, R/2] each."""
        steps = torch.arange(length, dtype=self.frequencies.dtype, device=self.frequencies.device)
        angles = torch.outer(steps, self.frequencies)
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

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
            decay = (self.gammas[layer][:, None, None] ** distance).tril().to(x.dtype)
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


def read_ids(folder: Path, suffix: str, tokenizer: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of every file of a folder, (training, held out): every 20th file is held out."""
    encode = encoder(tokenizer)
    sets: tuple[list[int], list[int]] = ([], [])
    for index, file in enumerate(sorted(folder.rglob(f"*{suffix}"))):
        sets[index % 20 == 19].extend(encode(file.read_text(encoding="utf-8", errors="ignore")))
    if min(map(len, sets)) < 1000:
        raise SystemExit(f"{folder}: too little text in *{suffix} files, expected at least 20 files")
    return np.array(sets[0]), np.array(sets[1])


def encoder(tokenizer: Path) -> Callable[[str], list[int]]:
    from dijiang.runtime.text import TextTokenizer

    return TextTokenizer.read(tokenizer).encode


def windows(ids: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """[B, length + 1]: each start's token, and those that follow."""
    return torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)])


def drawn(ids: np.ndarray, args: argparse.Namespace, start: int) -> Iterator[Tensor]:
    """Batches of windows at random places; the same for the same seed and number of the batch."""
    while True:
        random = np.random.default_rng([args.seed, start])
        yield windows(ids, random.integers(0, len(ids) - args.length - 1, args.batch), args.length)
        start += 1


def packed(texts: Iterable[str], encode: Callable[[str], list[int]], batch: int, length: int) -> Iterator[Tensor]:
    """Batches of windows of texts one after another, whatever iterable they come from."""
    kept: list[int] = []
    need = batch * (length + 1)
    for text in texts:
        kept.extend(encode(text))
        while len(kept) >= need:
            yield torch.tensor(kept[:need]).view(batch, length + 1)
            kept = kept[need:]


def lines_of(file: Path, held_out: bool) -> Iterator[str]:
    """The "text" of every line of a .jsonl file, again and again; of every 20th line: held out, once."""
    while True:
        with file.open(encoding="utf-8") as stream:
            yield from (json.loads(line)["text"] for n, line in enumerate(stream) if (n % 20 == 19) == held_out)
        if held_out:
            return


Batches = Callable[[int], Iterator[Tensor]]


def read_text(args: argparse.Namespace, tokenizer: Path) -> tuple[Batches, np.ndarray]:
    """Batches from a number on, and the held-out ids."""
    if args.text.suffix != ".jsonl":
        ids, held_out = read_ids(args.text, args.suffix, tokenizer)
        print(f"{len(ids):,} tokens to train on, {len(held_out):,} held out")
        return lambda start: drawn(ids, args, start), held_out
    encode = encoder(tokenizer)
    held = [token for text in islice(lines_of(args.text, True), 1000) for token in encode(text)]

    def batches(start: int) -> Iterator[Tensor]:
        return islice(packed(lines_of(args.text, False), encode, args.batch, args.length), start, None)

    return batches, np.array(held)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy, nats."""
    return cross_entropy(model(batch[:, :-1]), batch)


def cross_entropy(logits: Tensor, batch: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


class Teacher:
    """The vanilla model, and what goes into and comes out of each of its attention modules."""

    def __init__(self, vanilla: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(vanilla, dtype=dtype).to(device).eval()
        self.seen: list[tuple[Tensor, Tensor]] = []
        for name, module in self.model.named_modules():
            if re.search(r"layers\.\d+\.(attention|self_attn)$", name):
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
        found = model.attention(layer, model.weights(f"layers.{layer}."), x, model.turn(x.shape[1], x.dtype))
        losses.append((found.float() - expected).square().mean() / expected.square().mean())
    return torch.stack(losses).mean()


def logit_loss(model: nn.Module, teacher: Teacher, batch: Tensor, share: float) -> Tensor:
    """`share` of the divergence from the teacher's next tokens, the rest cross-entropy."""
    logits, target = model(batch[:, :-1]).float(), teacher(batch[:, :-1])[0]
    far = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    return share * far + (1 - share) * cross_entropy(logits, batch)


def objective(
    model: nn.Module, args: argparse.Namespace, teacher: Teacher | None
) -> Callable[[int, Tensor], Tensor]:
    """(step, batch) -> what is made small: first attention, then logits, or without a teacher cross-entropy."""
    if teacher is None:
        return lambda step, batch: loss_of(model, batch)
    aligned = round(args.align * args.steps)

    def loss(step: int, batch: Tensor) -> Tensor:
        if step <= aligned:
            return attention_loss(model, teacher, batch)
        return logit_loss(model, teacher, batch, args.teach)

    return loss


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: np.ndarray, length: int, device: torch.device, count: int = 32) -> float:
    """Over `count` windows spread evenly over the held-out ids."""
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    parts = (windows(ids, part, length).to(device) for part in np.split(starts, 4))
    return float(np.mean([loss_of(model, part).item() for part in parts]))


def rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate: warm-up, then a cosine down to a tenth."""
    warm_up = max(1, args.steps // 20)
    return args.lr * min(step / warm_up, 0.55 + 0.45 * math.cos(math.pi * (step - 1) / args.steps))


def train(
    model: nn.Module,
    batches: Batches,
    held_out: np.ndarray,
    args: argparse.Namespace,
    teacher: Teacher | None = None,
) -> Iterator[tuple[int, float | None, float]]:
    """AdamW; yields (step, training loss, held-out loss) at every report. A step is `accumulate` batches.

    What is needed to go on is in the file `state` after each report. Where it is there, training goes on.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    loss_at = objective(model, args, teacher)
    first, losses = 1, []
    if args.state is not None and args.state.exists():
        stored = torch.load(args.state, map_location=device, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        first = stored["step"] + 1
    else:
        with mixed(args, device):
            yield 0, None, held_out_loss(model, held_out, args.length, device)
    source = batches((first - 1) * args.accumulate)
    for step in range(first, args.steps + 1):
        optimizer.zero_grad()
        for batch in islice(source, args.accumulate):
            with mixed(args, device):
                loss = loss_at(step, batch.to(device)) / args.accumulate
            losses.append(finite(loss.item() * args.accumulate, step))
            loss.backward()
        nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        optimizer.step()
        if step % args.report == 0 or step == args.steps:
            with mixed(args, device):
                held = finite(held_out_loss(model, held_out, args.length, device), step)
            yield step, float(np.mean(losses)), held
            losses.clear()
            if args.state is not None:
                stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(stored, args.state.with_suffix(".new"))
                args.state.with_suffix(".new").replace(args.state)


def finite(loss: float, step: int) -> float:
    """The loss; the end of a training that diverged, before its state is stored."""
    if not math.isfinite(loss):
        raise SystemExit(f"step {step}: the loss is {loss}; lower --lr, and go on from the last --state")
    return loss


def mixed(args: argparse.Namespace, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where that was asked for; weights and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16)


def save(model: Dijiang, source: Path, output: Path) -> None:
    """The trained tensors as a checkpoint; everything else is the source's."""
    from safetensors.torch import save_file

    output.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, output / file.name)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state().items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def run(
    model: nn.Module,
    batches: Batches,
    held_out: np.ndarray,
    args: argparse.Namespace,
    teacher: Teacher | None = None,
) -> None:
    """Train and report on stdout, and to the CSV file of --log."""
    if args.output.exists():
        raise SystemExit(f"{args.output} exists and is never overwritten; choose a new folder")
    if len(held_out) <= args.length + 1:
        raise SystemExit(
            f"{len(held_out)} tokens are held out, expected more than --length {args.length}; give more text"
        )
    if args.log is not None and not (args.state is not None and args.state.exists()):
        args.log.write_text("step,tokens,loss,held_out_loss\n")
    started, first = time.perf_counter(), None
    for step, loss, held in train(model, batches, held_out, args, teacher):
        first, seconds = step if first is None else first, time.perf_counter() - started
        tokens = step * args.accumulate * args.batch * args.length
        shown = "" if loss is None else f"{loss:.4f}"
        left = "" if step == first else f", {seconds / (step - first) * (args.steps - step):.0f} s to go"
        print(f"step {step} of {args.steps}, {tokens:,} tokens: loss {shown or '-'}, held out {held:.3f}, "
              f"{seconds:.0f} s{left}", flush=True)  # fmt: skip
        if args.log is not None:
            with args.log.open("a") as log:
                log.write(f"{step},{tokens},{shown},{held:.4f}\n")


def arguments(about: str) -> argparse.ArgumentParser:
    """Options that every training script has."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("text", type=Path, help="folder of text files, or a .jsonl file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--suffix", default=".txt", help="of the files to read")
    parser.add_argument("--log", type=Path, help="CSV file of the losses")
    parser.add_argument("--state", type=Path, help="file to go on from, if training is interrupted")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="windows at once")
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--report", type=int, default=25, help="steps between two lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what dijiang convert wrote")
    parser.add_argument("--teacher", type=Path, help="the vanilla checkpoint: learn from it")
    parser.add_argument("--align", type=float, default=0.25, help="share of the steps for attention alone")
    parser.add_argument("--teach", type=float, default=0.5, help="the teacher's share in the loss of logits")
    parser.add_argument("--recompute", action="store_true", help="less memory, more time: gradient checkpointing")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    model = Dijiang(args.checkpoint, recompute=args.recompute).to(device)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    teacher = None if args.teacher is None else Teacher(args.teacher, device, dtype)
    batches, held_out = read_text(args, args.checkpoint / "tokenizer.json")
    run(model, batches, held_out, args, teacher)
    save(model, args.checkpoint, args.output)


if __name__ == "__main__":
    main()
