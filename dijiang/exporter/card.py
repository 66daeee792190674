"""The model card of a bundle: README.md, for whoever finds the folder, or uploads it."""

from __future__ import annotations

from ..bundle.manifest import MANIFEST, PARITY, Manifest
from ..models.tokenizer import TOKENIZER

CARD = "README.md"
#: How a bundle is tried: with a tokenizer, and without.
WITH_TEXT = 'dijiang run THIS_FOLDER -p "text to continue"'
WITH_IDS = """echo '{"prompt": [1, 2, 3]}' > prompts.jsonl  # token ids: this bundle has no tokenizer
    dijiang run THIS_FOLDER --jsonl prompts.jsonl -o answers.jsonl"""
TEXT = """---
library_name: dijiang
pipeline_tag: text-generation
tags: [dijiang, linear-attention, onnx]
---

# A {family} DiJiang model for ONNX Runtime

Linear attention (arXiv 2403.19928): the memory of a text is {state} bytes, at any length.

    pip install 'dijiang[cpu]'
    {usage}

With `dijiang[cpu,hub]`, the name of this folder's repository stands for the folder.

| | |
|---|---|
| layers, hidden channels, heads | {layers}, {hidden}, {heads} |
| parameters | {parameters} |
| vocabulary | {vocabulary} |
| precision | {precision} |
| graphs | {graphs} |
| positions | {positions} |
| decay | {decay_mode} |
| written by dijiang | {version} |

`{manifest}` describes the files, with hashes. `{parity}`, if there, says how near they are to the checkpoint.
The licence is that of the checkpoint. This page is no part of the hashed files: add to it what you know.
"""


def model_card(manifest: Manifest) -> str:
    """The page, in Markdown with the metadata that the Hub reads."""
    spec = manifest.spec
    return TEXT.format(
        usage=WITH_TEXT if TOKENIZER in manifest.files else WITH_IDS,
        family=spec.family,
        state=f"{spec.state_bytes:,}",
        layers=spec.num_layers,
        hidden=spec.hidden_size,
        heads=spec.num_heads,
        parameters=f"{manifest.parameters:,}",
        vocabulary=f"{spec.vocab_size:,}",
        precision=manifest.recipe.title,
        graphs=", ".join(manifest.graphs),
        positions="no end" if manifest.positions_limit is None else manifest.positions_limit,
        decay_mode=manifest.decay,
        version=manifest.versions["dijiang"],
        manifest=MANIFEST,
        parity=PARITY,
    )
