"""Training on text, for the scripts of this folder: batches, a plain PyTorch loop, and its state on disk."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pickle
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dijiang.errors import DijiangError, InputError
from dijiang.files import check_file, check_new, write_file, written_file

#: What reading a file of another kind raises.
UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError)
#: Options that decide what a training is, where a script has them. One that diverged goes on with another --lr.
DECIDING = ("steps", "batch", "accumulate", "length", "seed", "bfloat16", "align", "teach")
Batches = Callable[[int], Iterator[Tensor]]
#: Token ids of a text.
Encode = Callable[[str], list[int]]
#: (number of the step, batch [B, length + 1]) -> what is made small.
Objective = Callable[[int, Tensor], Tensor]


def read_ids(folder: Path, suffix: str, encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of every file of a folder, (training, held out): every 20th file is held out."""
    sets: tuple[list[int], list[int]] = ([], [])
    for index, file in enumerate(sorted(folder.rglob(f"*{suffix}"))):
        sets[index % 20 == 19].extend(encode(file.read_text(encoding="utf-8", errors="ignore")))
    if min(map(len, sets)) < 1000:
        raise SystemExit(f"{folder}: too little text in *{suffix} files, expected at least 20 files")
    return np.array(sets[0]), np.array(sets[1])


def windows(ids: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """[B, length + 1]: each start's token, and those that follow."""
    return torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)])


def drawn(ids: np.ndarray, args: argparse.Namespace, start: int) -> Iterator[Tensor]:
    """Batches of windows at random places; the same for the same seed and number of the batch."""
    while True:
        random = np.random.default_rng([args.seed, start])
        yield windows(ids, random.integers(0, len(ids) - args.length - 1, args.batch), args.length)
        start += 1


def packed(texts: Iterable[str], encode: Encode, batch: int, length: int) -> Iterator[Tensor]:
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
        found = False
        with file.open(encoding="utf-8", errors="replace") as stream:
            for number, line in enumerate(stream):
                if (number % 20 == 19) == held_out and line.strip():
                    found = True
                    yield text_of(line, f"{file}:{number + 1}")
        if held_out or not found:
            return


def text_of(line: str, where: str) -> str:
    """The "text" of a line; SystemExit if it has none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{where}: no JSON ({error}); expected an object with a text") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise SystemExit(f'{where}: no "text" that is one, found {line.strip()[:60]}; write {{"text": "..."}}')
    return text


def read_text(args: argparse.Namespace, encode: Encode) -> tuple[Batches, np.ndarray]:
    """Batches from a number on, and the held-out ids."""
    if args.text.suffix != ".jsonl":
        ids, held_out = read_ids(args.text, args.suffix, encode)
        print(f"{len(ids):,} tokens to train on, {len(held_out):,} held out")
        return lambda start: drawn(ids, args, start), held_out
    held = [token for text in islice(lines_of(args.text, True), 1000) for token in encode(text)]

    def batches(start: int) -> Iterator[Tensor]:
        return islice(packed(lines_of(args.text, False), encode, args.batch, args.length), start, None)

    return batches, np.array(held)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy, nats."""
    return cross_entropy(model(batch[:, :-1]), batch)


def cross_entropy(logits: Tensor, batch: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


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


class Saved:
    """What is needed to go on with a training, in a file that is whole or not there.

    of: what the training is: its options, and hashes of what it starts from. That of another one is refused.
    file: None: nothing is kept.
    """

    def __init__(self, file: Path | None, of: dict[str, Any]) -> None:
        self.file, self.of = file, of

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
        """The steps that are done; model and optimizer are as they were after them.

        Raises:
            SystemExit: the file is damaged, or of another training.
        """
        if self.file is None or not self.file.exists():
            return 0
        try:
            with zipfile.ZipFile(self.file) as archive:  # torch compares no checksums
                if torn := archive.testzip():
                    raise ValueError(f"{torn} is damaged")
            stored = torch.load(self.file, map_location=device, weights_only=True)
            other = [key for key, value in self.of.items() if stored["of"].get(key) != value]
        except (*UNREADABLE, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise SystemExit(
                f"{self.file}: no whole state of a training ({reason}); restore it, or remove it to begin anew"
            ) from error
        if other:
            found, expected = stored["of"].get(other[0]), self.of[other[0]]
            raise SystemExit(
                f"{self.file}: of another training ({other[0]} {found}, expected {expected}); "
                "remove it, or give another --state"
            )
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        print(f"{self.file}: {stored['step']} steps are done", flush=True)
        return stored["step"]

    def store(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Keep all of it."""
        if self.file is not None:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "of": self.of}
            with written_file(self.file, InputError) as stream:
                torch.save(parts, stream)


def identity(model: nn.Module, held_out: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """What a training is, before its first step."""
    start = hashlib.sha256()
    for tensor in model.state_dict().values():
        start.update(tensor.detach().cpu().numpy().tobytes())
    options = {name: getattr(args, name) for name in DECIDING if hasattr(args, name)}
    text = hashlib.sha256(held_out.tobytes()).hexdigest()
    taught = getattr(args, "teacher", None) is not None
    return options | {"teacher": taught, "checkpoint": start.hexdigest()[:16], "held-out text": text[:16]}


def train(
    model: nn.Module, batches: Batches, held_out: np.ndarray, args: argparse.Namespace, objective: Objective
) -> Iterator[tuple[int, float | None, float]]:
    """AdamW; yields (step, training loss, held-out loss) at every report. A step is `accumulate` batches.

    What is needed to go on is in the file `state` after each report. Where it is there, training goes on.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    saved = Saved(args.state, identity(model, held_out, args))
    done, losses = saved.load(model, optimizer, device), []
    if not done:
        with mixed(args, device):
            yield 0, None, held_out_loss(model, held_out, args.length, device)
    source = batches(done * args.accumulate)
    for step in range(done + 1, args.steps + 1):
        optimizer.zero_grad()
        for batch in islice(source, args.accumulate):
            with mixed(args, device):
                loss = objective(step, batch.to(device)) / args.accumulate
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
            saved.store(model, optimizer, step)


def finite(loss: float, step: int) -> float:
    """The loss; the end of a training that diverged, before its state is stored."""
    if not math.isfinite(loss):
        raise SystemExit(f"step {step}: the loss is {loss}; lower --lr, and go on from the last --state")
    return loss


def mixed(args: argparse.Namespace, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where that was asked for; weights and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16)


def check(args: argparse.Namespace) -> None:
    """SystemExit for options that cannot work, before anything is read."""
    for name in ("steps", "batch", "accumulate", "length", "report"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} {getattr(args, name)}, expected 1 or more")
    if not 0 < args.lr < math.inf:
        raise SystemExit(f"--lr {args.lr}, expected a number above 0")
    if args.seed < 0:
        raise SystemExit(f"--seed {args.seed}, expected 0 or more")
    if not args.text.exists():
        raise SystemExit(f"{args.text}: not found; give a folder of files, or a .jsonl file")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(
            f"--device {args.device}: not usable ({str(error).splitlines()[0]}); give another"
        ) from None
    check_new(args.output, [], InputError)
    for file in (args.log, args.state):
        if file is not None:
            check_file(file, InputError)


@contextmanager
def in_one_line() -> Iterator[None]:
    """What dijiang says of a file or a checkpoint, without a traceback."""
    try:
        yield
    except DijiangError as error:
        raise SystemExit(str(error)) from error


def drop_rows(log: Path, step: int) -> None:
    """Forget what a CSV file says of a step and later ones: a training that was killed goes on before them."""
    head, *rows = log.read_bytes().splitlines(keepends=True)
    steps = [row.partition(b",")[0] if row.endswith(b"\n") else b"" for row in rows]
    kept = [row for row, at in zip(rows, steps, strict=True) if at.isdigit() and int(at) < step]
    if len(kept) < len(rows):
        write_file(log, b"".join([head, *kept]), InputError)


def run(
    model: nn.Module, batches: Batches, held_out: np.ndarray, args: argparse.Namespace, objective: Objective
) -> None:
    """Train and report on stdout, and to the CSV file of --log."""
    if len(held_out) <= args.length + 1:
        raise SystemExit(
            f"{len(held_out)} tokens are held out, expected more than --length {args.length}; give more text"
        )
    goes_on = args.state is not None and args.state.exists()
    if args.log is not None and not (goes_on and args.log.exists() and args.log.stat().st_size):
        args.log.write_text("step,tokens,loss,held_out_loss\n")
    started, first = time.perf_counter(), None
    for step, loss, held in train(model, batches, held_out, args, objective):
        first, seconds = step if first is None else first, time.perf_counter() - started
        tokens = step * args.accumulate * args.batch * args.length
        shown = "" if loss is None else f"{loss:.4f}"
        left = "" if step == first else f", {seconds / (step - first) * (args.steps - step):.0f} s to go"
        print(f"step {step} of {args.steps}, {tokens:,} tokens: loss {shown or '-'}, held out {held:.3f}, "
              f"{seconds:.0f} s{left}", flush=True)  # fmt: skip
        if args.log is not None:
            drop_rows(args.log, step)
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
