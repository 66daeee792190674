"""A bundle for the loop of onnxruntime-genai: its graph with that loop's inputs, and genai_config.json.

The loop feeds masks of the whole length, knows no `logit_indices`, and expects a second state a layer, of a
convolution. So the graph gets a few more nodes at its start, and one a layer at its end.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .. import Bundle, ExportError
from ..recipe import GRAPHS

try:
    import onnx
    from onnx import TensorProto, helper
except ImportError as error:
    raise ImportError(f"{error}; pip install 'dijiang[genai]'") from error

PAST = "past_key_values.%d.{}_state"
PRESENT = "present.%d.{}_state"
KINDS = ("recurrent", "conv")
#: Tokens that the loop keeps room for, where positions have no end: 4 MB.
CONTEXT = 1 << 20
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write(bundle: Bundle, folder: Path) -> None:
    """Write a folder that onnxruntime-genai loads; the weights are linked where the disk can do that, else copied.

    Args:
        bundle: with a graph that needs no compiled operator.
        folder: exists and is empty.

    Raises:
        ExportError: the bundle has no such graph.
    """
    manifest = bundle.manifest
    name = next((name for name in manifest.graphs if not GRAPHS[name].operators), None)
    if name is None:
        raise ExportError(f"{bundle.path}: every graph needs the compiled operator; export again without --graph")
    source = bundle.graph_file(name)
    graph = onnx.load(source, load_external_data=False)
    _adapt(graph.graph, manifest.spec.num_layers)
    onnx.save(graph, folder / source.name)
    for file in manifest.files:
        if file.endswith(".data"):
            _link(bundle.path / file, folder / file)
        elif file in TOKENIZER:
            shutil.copyfile(bundle.path / file, folder / file)
    config = json.dumps(_config(bundle, source.name), indent=1) + "\n"
    (folder / "genai_config.json").write_text(config, encoding="utf-8")


def _adapt(graph: onnx.GraphProto, layers: int) -> None:
    """Give a step graph the inputs and outputs of the loop: the last token's logits, and what it calls states."""
    first = [
        helper.make_node("Shape", ["input_ids"], ["genai_length"], start=1, end=2),
        helper.make_node("Neg", ["genai_length"], ["genai_start"]),
        helper.make_node("Constant", [], ["genai_end"], value_ints=[2**62]),
        helper.make_node("Constant", [], ["genai_axis"], value_ints=[1]),
        helper.make_node("Slice", ["attention_mask", "genai_start", "genai_end", "genai_axis"], ["genai_mask"]),
        # The last token of each row: the loop pads on the right.
        helper.make_node("ArgMax", ["genai_mask"], ["logit_indices"], axis=1, select_last_index=1),
    ]
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[at] = "genai_mask"
    inputs = [one for one in graph.input if one.name != "logit_indices"]
    outputs = [one for one in graph.output if one.name != "next_tokens"]
    _dimension(inputs, "attention_mask").dim_param = "total"
    _dimension(outputs, "logits").dim_value = 1
    last = []
    for layer in range(layers):
        past, present = (pattern.format("conv") % layer for pattern in (PAST, PRESENT))
        last.append(helper.make_node("Identity", [past], [present]))
        inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, ["batch", 1, 1]))
        outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, ["batch", 1, 1]))
    for field, values in (("node", [*first, *graph.node, *last]), ("input", inputs), ("output", outputs)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def _dimension(values: list[onnx.ValueInfoProto], name: str) -> Any:
    """The second dimension of an input or output, empty."""
    found = next(one for one in values if one.name == name).type.tensor_type.shape.dim[1]
    found.Clear()
    return found


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _config(bundle: Bundle, file: str) -> dict[str, Any]:
    spec, limit = bundle.manifest.spec, bundle.manifest.positions_limit
    ends = list(spec.eos_token_ids)
    begins = spec.bos_token_id if spec.bos_token_id is not None else next(iter(ends), 0)
    return {
        "model": {
            "type": "decoder",
            "vocab_size": spec.vocab_size,
            "context_length": limit or CONTEXT,
            "bos_token_id": begins,
            "eos_token_id": ends or [begins],
            "pad_token_id": next(iter(ends), begins),
            "decoder": {
                "filename": file,
                "session_options": {"provider_options": []},
                "hidden_size": spec.hidden_size,
                "head_size": spec.head_size,
                "num_attention_heads": spec.num_heads,
                "num_key_value_heads": spec.num_kv_heads,
                "num_hidden_layers": spec.num_layers,
                "inputs": {
                    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                    **{f"past_{kind}_names": PAST.format(kind) for kind in KINDS},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{kind}_names": PRESENT.format(kind) for kind in KINDS},
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(spec.max_positions, limit or spec.max_positions),
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
