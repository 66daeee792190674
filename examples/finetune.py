"""Fine-tune a converted checkpoint on a folder of text: a short, plain PyTorch loop.

    python examples/finetune.py TEXT_FOLDER --checkpoint CHECKPOINT -o OUTPUT --suffix .py

D1, D2 and the projection of the feature map stay as they are: with trained D1 and D2 positions would
end where their tables do, and decoding them exactly would need those tables.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from dijiang.models.binding import shapes
from dijiang.models.load import FAMILIES, load_checkpoint
from dijiang.models.rotary import inverse_frequencies

#: What training leaves alone, by the ends of the tensors' names.
FROZEN = (".D1", ".D2", ".proj_matrix")


class Dijiang(nn.Module):
    """A DiJiang checkpoint in the parallel form, for training; ids [B, T] -> logits [B, T, vocab].

    The parameters are the checkpoint's own tensors. What the forward pass needs is made of them by the
    family's bindings, so every family works and `state` gives back the tensors to save.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        model = load_checkpoint(checkpoint)
        self.spec = spec = model.spec
        self.bindings = FAMILIES[spec.family].bindings(spec)
        self.parts = nn.ParameterDict()
        for name in shapes(self.bindings):
            values = torch.from_numpy(model.checkpoint.read(name).astype(np.float32))
            self.parts[name.replace(".", "/")] = nn.Parameter(values, not name.endswith(FROZEN))
        frequencies = torch.from_numpy(inverse_frequencies(spec))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.gammas = [torch.from_numpy(decay.gamma) for decay in model.decays]
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
        angles = torch.outer(torch.arange(length, dtype=torch.float64), self.frequencies)
        turn = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
        for layer in range(spec.num_layers):
            x = self.layer(layer, self.weights(f"layers.{layer}."), x, turn)
        if spec.final_norm:
            x = self.norm(w, "final_norm", x)
        if spec.embedding_size is not None:
            x = linear(w, "embed_out", x)
        return linear(w, "head", x)

    def layer(self, layer: int, w: dict[str, Tensor], x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
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
        qkv = linear(w, "qkv", x).unflatten(-1, (-1, size))
        q, k, v = qkv.split([heads, groups, groups], dim=2)
        q, k = ((rotate(z, turn) @ w["proj.weight"]).softmax(-1) for z in (q, k))
        k, v = (z.repeat_interleave(heads // groups, dim=2) for z in (k, v))
        steps = torch.arange(x.shape[1])
        distance = (steps[:, None] - steps).double()
        decay = (self.gammas[layer][:, None, None] ** distance.clamp(min=0)).tril().to(x.dtype)
        scores = torch.einsum("bthk,bshk->bhts", q, k) * decay.repeat_interleave(heads // groups, dim=0)
        out = torch.einsum("bhts,bshv->bthv", scores, v).flatten(0, 1).flatten(1)
        normed = F.group_norm(out, size, w["group_norm.weight"], w["group_norm.bias"], spec.group_norm_eps).view_as(
            x
        )
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
    from dijiang.runtime.text import TextTokenizer

    encode = TextTokenizer.read(tokenizer).encode
    sets: tuple[list[int], list[int]] = ([], [])
    for index, file in enumerate(sorted(folder.rglob(f"*{suffix}"))):
        sets[index % 20 == 19].extend(encode(file.read_text(encoding="utf-8", errors="ignore")))
    if min(map(len, sets)) < 1000:
        raise SystemExit(f"{folder}: too little text in *{suffix} files, expected at least 20 files")
    return np.array(sets[0]), np.array(sets[1])


def windows(ids: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """[B, length + 1]: each start's token, and those that follow."""
    return torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy, nats."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: np.ndarray, length: int, count: int = 32) -> float:
    """Over `count` windows spread evenly over the held-out ids."""
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    losses = [loss_of(model, windows(ids, part, length)).item() for part in np.split(starts, 4)]
    return float(np.mean(losses))


def train(model: nn.Module, ids: np.ndarray, held_out: np.ndarray, args: argparse.Namespace):
    """AdamW with warm-up and cosine; yields (step, training loss, held-out loss) at every report."""
    random = np.random.default_rng(args.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * np.cos(np.pi * step / args.steps)),
    )
    losses = []
    yield 0, None, held_out_loss(model, held_out, args.length)
    for step in range(1, args.steps + 1):
        starts = random.integers(0, len(ids) - args.length - 1, args.batch)
        loss = loss_of(model, windows(ids, starts, args.length))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % args.report == 0 or step == args.steps:
            yield step, float(np.mean(losses)), held_out_loss(model, held_out, args.length)
            losses.clear()


def save(model: Dijiang, source: Path, output: Path) -> None:
    """The trained tensors as a checkpoint; everything else is the source's."""
    from safetensors.torch import save_file

    output.mkdir()
    for file in source.iterdir():
        if file.is_file() and "model" not in file.name:
            shutil.copyfile(file, output / file.name)
    tensors = {name: tensor.contiguous() for name, tensor in model.state().items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def run(model: nn.Module, ids: np.ndarray, held_out: np.ndarray, args: argparse.Namespace) -> None:
    """Train and report on stdout, and to the CSV file of --log."""
    if args.output.exists():
        raise SystemExit(f"{args.output} exists and is never overwritten; choose a new folder")
    print(f"{len(ids):,} tokens to train on, {len(held_out):,} held out")
    rows: list[tuple] = [("step", "loss", "held_out_loss")]
    started = time.perf_counter()
    for step, loss, held in train(model, ids, held_out, args):
        rows.append((step, "" if loss is None else f"{loss:.4f}", f"{held:.4f}"))
        print(f"step {step}: held-out loss {held:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
        if args.log is not None:
            args.log.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


def arguments(about: str) -> argparse.ArgumentParser:
    """Options that every training script has."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("text", type=Path, help="folder of text files")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--suffix", default=".txt", help="of the files to read")
    parser.add_argument("--log", type=Path, help="CSV file of the losses")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--report", type=int, default=25, help="steps between two lines")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what dijiang convert wrote")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = Dijiang(args.checkpoint)
    ids, held_out = read_ids(args.text, args.suffix, args.checkpoint / "tokenizer.json")
    run(model, ids, held_out, args)
    save(model, args.checkpoint, args.output)


if __name__ == "__main__":
    main()
