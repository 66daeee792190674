"""How often the gates refuse a right export, and let a wrong one pass: random models, and planted faults.

    python benchmarks/gates.py -o REPORT.json [--models 60] [--seed 1]

Each model is exported to int8 and int4 in a graph that is drawn, and verified against itself, and against two
checkpoints that differ from it by a fault. Bounds are also counted by the rules of before (ADR 0042): `absolute`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from reports import tell
from safetensors.numpy import load_file, save_file

import dijiang
from dijiang.parity.findings import Parity
from tests.random_models import write

Tensors = dict[str, np.ndarray]
WIDTHS, LAYERS, VOCABULARIES = (64, 128, 256), (2, 2, 4, 4, 8, 16, 24), (500, 1000, 8000)
#: What queries and keys are multiplied by: large ones make a feature map sharp, and rounding costly.
SHARPNESS = (1, 1, 1, 3, 0.3)
#: Options of the exports that are drawn.
WAYS: tuple[dict[str, Any], ...] = (
    {"graph": "native"},
    {"graph": "native", "calibration_tokens": 0},
    {"graph": "ort"},
    {"graph": "primitive", "calibration_tokens": 0},
    {"target": "cuda", "graph": "cuda"},
    {"target": "cuda", "graph": "cuda", "calibration_tokens": 0},
)
#: Precision -> the absolute bounds of before, in place of those beyond rounding.
ABSOLUTE = {
    "int8": {"early_state_error": 0.1, "rms_relative_error": 0.7},
    "int4": {"early_state_error": 0.6, "rms_relative_error": 1.3},
}
BEYOND = {"state_beyond_rounding", "error_beyond_rounding"}
TOKENS, FAULTS_EACH = 256, 2

#: Ends of the names of tensors, in any family.
ATTENTION = ("query_key_value.weight", "q_proj.weight", "k_proj.weight")
OUT = ("attention.dense.weight", "o_proj.weight", "out_proj.weight")
UP = ("dense_h_to_4h.weight", "up_proj.weight", "fc1.weight")
DOWN = ("dense_4h_to_h.weight", "down_proj.weight", "fc2.weight")


def negated(weight: np.ndarray) -> np.ndarray:
    """A sixteenth of the rows with the other sign."""
    weight[: max(1, len(weight) // 16)] *= -1
    return weight


#: Name -> tensors, whether of the first layer only, and what becomes of each.
FAULTS: dict[str, tuple[tuple[str, ...], bool, Callable[[np.ndarray], np.ndarray]]] = {
    "attention reads the channel beside": (ATTENTION, True, lambda w: np.roll(w, 1, -1)),
    "attention in other rows": (ATTENTION, True, lambda w: np.roll(w, 1, 0)),
    "some rows of attention negated": (ATTENTION, True, negated),
    "attention's output negated": (OUT, True, lambda w: -w),
    "attention's outputs in other rows": (OUT, False, lambda w: np.roll(w, 1, 0)),
    "MLP reads the channel beside": (UP, True, lambda w: np.roll(w, 1, -1)),
    "MLP's outputs halved": (DOWN, False, lambda w: w * np.float32(0.5)),
    "some rows of MLP's outputs negated": (DOWN, False, negated),
}


def config(draw: random.Random) -> dict[str, Any]:
    """Of a model of any family."""
    width = draw.choice(WIDTHS)
    heads = draw.choice([count for count in (1, 2, 4, 8) if width // count >= 16])
    shared = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice(LAYERS),
        "vocab_size": draw.choice(VOCABULARIES),
        "max_position_embeddings": 512,
    }
    return shared | draw.choice(
        [
            {
                "model_type": "gpt_neox",
                "intermediate_size": 4 * width,
                "rotary_pct": 0.25,
                "use_parallel_residual": draw.random() < 0.5,
                "hidden_act": "gelu",
            },
            {
                "model_type": "llama",
                "intermediate_size": draw.choice([344, 2 * width + 32, 4 * width]),
                "num_key_value_heads": draw.choice([count for count in (1, 2, 4, 8) if heads % count == 0]),
                "rms_norm_eps": 1e-5,
                "hidden_act": "silu",
            },
            {
                "model_type": "opt",
                "word_embed_proj_dim": width,
                "ffn_dim": 4 * width,
                "do_layer_norm_before": draw.random() < 0.7,
                "activation_function": "relu",
            },
        ]
    )


def checkpoint(folder: Path, draw: random.Random) -> Path:
    """A random model in a new folder."""
    folder.mkdir()
    write(folder, config(draw), trained=draw.random() < 0.5, seed=draw.randrange(10**6))
    factor = np.float32(draw.choice(SHARPNESS))
    tensors = load_file(folder / "model.safetensors")
    save_file(changed(tensors, ATTENTION, False, lambda w: w * factor), folder / "model.safetensors")
    return folder


def changed(
    tensors: Tensors, ends: tuple[str, ...], first: bool, change: Callable[[np.ndarray], np.ndarray]
) -> Tensors:
    """Tensors, those of these names changed."""
    names = [name for name in tensors if name.endswith(ends) and (".0." in name or not first)]
    return tensors | {name: np.ascontiguousarray(change(tensors[name].copy())) for name in names}


def verdicts(report: Parity, precision: str) -> tuple[set[str], bool]:
    """The gates that refuse it; whether it is refused with absolute bounds in place of those beyond rounding."""
    failed = {verdict.metric for verdict in report.gates if not verdict.passed}
    metrics = report.metrics
    above = any(not (metrics[name] or 0) <= bound for name, bound in ABSOLUTE[precision].items())
    return failed, bool(failed - BEYOND) or above


def measure(folder: Path, draw: random.Random, counts: dict[str, Counter[str]]) -> None:
    """One model, in every precision."""
    right = checkpoint(folder / "right", draw)
    for precision in ABSOLUTE:
        bundle = dijiang.export(right, folder / precision, precision=precision, verify=False, **draw.choice(WAYS))
        others = [(right, "right")]
        for name in draw.sample(sorted(FAULTS), FAULTS_EACH):
            wrong = Path(shutil.copytree(right, folder / f"{precision} {name}"))
            save_file(changed(load_file(right / "model.safetensors"), *FAULTS[name]), wrong / "model.safetensors")
            others.append((wrong, "wrong"))
        for other, kind in others:
            report = dijiang.verify(bundle.path, other, tokens=TOKENS, store=False)
            failed, by_absolute = verdicts(report, precision)
            found = {kind: 1, f"{kind}, refused": bool(failed), f"{kind}, refused by absolute bounds": by_absolute}
            counts[precision].update({what: int(count) for what, count in found.items()})
            if kind == "right":
                counts[precision].update(f"right, {gate}" for gate in failed)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    draw, counts = random.Random(given.seed), {precision: Counter[str]() for precision in ABSOLUTE}
    for number in range(given.models):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), draw, counts)
        print(f"{number + 1} of {given.models}", file=sys.stderr, flush=True)
    tell({"models": given.models, "seed": given.seed, "dijiang": dijiang.__version__, **counts}, given.output)


if __name__ == "__main__":
    main()
