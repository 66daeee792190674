"""A bundle for the loop of onnxruntime-genai: its graph with that loop's inputs, and genai_config.json.

The loop feeds masks of the whole length, knows no `logit_indices`, and expects a second state a layer, of a
convolution. So the graph gets a few more nodes at its start, and one a layer at its end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onnx import GraphProto, TensorProto, ValueInfoProto, helper

from .. import Bundle
from .rewire import change, needs, on_gpu, standalone, write_graph

PAST = "past_key_values.%d.{}_state"
PRESENT = "present.%d.{}_state"
KINDS = ("recurrent", "conv")
#: Tokens that the loop keeps room for, where positions have no end: 4 MB.
CONTEXT = 1 << 20
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write(bundle: Bundle, folder: Path, *, link: bool = False) -> list[str]:
    """Write a folder that onnxruntime-genai loads; what to know about it, a line each.

    Args:
        bundle: with a graph that needs no compiled operator.
        folder: exists and is empty.
        link: the weights are hard links where the disk can do that, else copies.

    Raises:
        ExportError: the bundle has no such graph.
    """
    name = standalone(bundle)[0]
    file = bundle.graph_file(name).name
    write_graph(
        bundle, name, folder / file, lambda graph: _adapt(graph, bundle.manifest.spec.num_layers), link=link
    )
    for extra in (extra for extra in bundle.manifest.files if extra in TOKENIZER):
        shutil.copyfile(bundle.path / extra, folder / extra)
    config = json.dumps(_config(bundle, name), indent=1) + "\n"
    (folder / "genai_config.json").write_text(config, encoding="utf-8")
    return needs(bundle, name)


def _adapt(graph: GraphProto, layers: int) -> None:
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
    _dimension(graph.input, "attention_mask").dim_param = "total"
    _dimension(graph.output, "logits").dim_value = 1
    states = [[pattern.format("conv") % layer for pattern in (PAST, PRESENT)] for layer in range(layers)]
    past, present = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, 1]) for name in names]
        for names in zip(*states, strict=True)
    )
    change(
        graph,
        without=("logit_indices", "next_tokens"),
        first=first,
        last=[helper.make_node("Identity", [before], [after]) for before, after in states],
        inputs=past,
        outputs=present,
    )


def _dimension(values: Iterable[ValueInfoProto], name: str) -> Any:
    """The second dimension of an input or output, empty."""
    found = next(one for one in values if one.name == name).type.tensor_type.shape.dim[1]
    found.Clear()
    return found


def _config(bundle: Bundle, graph: str) -> dict[str, Any]:
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
                "filename": bundle.graph_file(graph).name,
                "session_options": {"provider_options": [{"cuda": {}}] if on_gpu(bundle, graph) else []},
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
