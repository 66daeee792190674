"""Train a small vanilla GPT-NeoX (transformers' own) for examples/finetune.md to convert.

    python examples/pretrain_vanilla.py TEXT_FOLDER -o OUTPUT --suffix .py

The tokenizer is that of examples/tiny-python, and so is the shape unless told otherwise. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from training import arguments, check, in_one_line, loss_of, read_text, run
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from dijiang.errors import InputError
from dijiang.files import new_folder
from dijiang.runtime.text import TextTokenizer

SHAPE = Path(__file__).parent / "tiny-python"


class Logits(nn.Module):
    """ids [B, T] -> logits [B, T, vocab]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=192, help="channels; six heads")
    args = parser.parse_args()
    with in_one_line():
        pretrain(args)


def pretrain(args: argparse.Namespace) -> None:
    check(args)
    torch.manual_seed(args.seed)
    config = json.loads((SHAPE / "config.json").read_text())
    for key in ("auto_map", "torch_dtype", "transformers_version"):
        del config[key]
    sizes = {"num_hidden_layers": args.layers, "hidden_size": args.hidden, "intermediate_size": 4 * args.hidden}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**config | sizes))
    batches, held_out = read_text(args, TextTokenizer.read(SHAPE / "tokenizer.json").encode)
    logits = Logits(model).to(args.device)
    run(logits, batches, held_out, args, lambda step, batch: loss_of(logits, batch))
    with new_folder(args.output, InputError) as folder:
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(SHAPE / name, folder / name)


if __name__ == "__main__":
    main()
