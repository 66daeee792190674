"""A bundle as a model repository of Triton Inference Server: a request is token ids, its answer the next token.

With the backend for onnxruntime Triton keeps the states: the graph gets its position from a state of its own, and
makes positions, mask and indices itself. With the one for Python `triton_python` keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from onnx import GraphProto, TensorProto, helper

from .. import Bundle, ExportError
from .rewire import change, needs, on_gpu, place, standalone, write_graph

NAME = re.compile(r"[\w][\w-]*", re.ASCII)
#: What the graph makes itself.
MADE = ("position_ids", "attention_mask", "logit_indices")
POSITION = ("past_position", "present_position")
STATES = ("past_key_values.{}.recurrent_state", "present.{}.recurrent_state")
#: Of the Python backend: its program, and what it is told of a request.
MODEL = "from dijiang.integrations.triton_python import TritonPythonModel as TritonPythonModel\n"
CONTROL = """
    {{ name: "{}" control [ {{ kind: CONTROL_SEQUENCE_{} {} }} ] }}"""
SWITCH = "int32_false_true: [ 0, 1 ]"
CONTROLS = (("START", "START", SWITCH), ("END", "END", SWITCH), ("CORRID", "CORRID", "data_type: TYPE_UINT64"))


def write(
    bundle: Bundle,
    repository: Path,
    *,
    name: str,
    batch: int = 16,
    candidates: int = 256,
    backend: str = "onnxruntime",
    link: bool = False,
) -> list[str]:
    """Write REPOSITORY/NAME: config.pbtxt, and as version 1 the graph, or the bundle; what to know, a line each.

    The graph is the one that runs on the oldest onnxruntime, since containers have older ones.

    Args:
        bundle: for onnxruntime with a graph that needs no compiled operator.
        repository: exists.
        name: of the model.
        backend: a key of BACKENDS.
        batch: sequences a step at most.
        candidates: sequences whose states are kept at most.
        link: the weights are hard links where the disk can do that, else copies.

    Raises:
        ExportError: the bundle has no such graph, or the name is none.
    """
    if not NAME.fullmatch(name):
        raise ExportError(f"{name!r} is no name of a model, expected letters, digits, - and _; change --name")
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    sequences, kind, notes = BACKENDS[backend](bundle, folder / "1", link)
    config = _config(bundle, name, backend, batch, candidates, kind, sequences)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    return notes


def _for_onnxruntime(bundle: Bundle, version: Path, link: bool) -> tuple[str, str, list[str]]:
    """Write the graph; how its states go from request to request."""
    records, spec = bundle.manifest.graphs, bundle.manifest.spec
    graph = min(standalone(bundle), key=lambda one: records[one].oldest)
    write_graph(bundle, graph, version / "model.onnx", partial(_adapt, vocab_size=spec.vocab_size), link=link)
    layers = [tuple(one.format(layer) for one in STATES) for layer in range(spec.num_layers)]
    states = [
        _state(POSITION, "TYPE_INT64", (1,)),
        *(_state(names, "TYPE_FP32", spec.state_shape) for names in layers),
    ]
    kind = "KIND_GPU" if on_gpu(bundle, graph) else "KIND_CPU"
    return f"  state [\n{','.join(states)}\n  ]", kind, needs(bundle, graph)


def _for_python(bundle: Bundle, version: Path, link: bool) -> tuple[str, str, list[str]]:
    """Write the bundle and what loads it; what it is told of each request."""
    (version / "model.py").write_text(MODEL, encoding="utf-8")
    (version / "bundle").mkdir()
    for file in ("dijiang.json", *bundle.manifest.files):
        place(bundle.path / file, version / "bundle" / file, link=link)
    controls = ",".join(CONTROL.format(*control) for control in CONTROLS)
    return f"  control_input [{controls}\n  ]", "KIND_CPU", []


#: What runs a repository -> writes its version; the rest of `sequence_batching`, the kind of its instances, notes.
BACKENDS: dict[str, Callable[[Bundle, Path, bool], tuple[str, str, list[str]]]] = {
    "onnxruntime": _for_onnxruntime,
    "python": _for_python,
}


def _adapt(graph: GraphProto, vocab_size: int) -> None:
    """Token ids and states in; the next token, its logits and states out.

    `triton_known` is 0 for every token: Gather refuses ids beyond the vocabulary, an embedding in blocks does not.
    """
    zero = helper.make_tensor("triton_nothing", TensorProto.INT64, [1], [0])
    past, present = POSITION
    first = [
        helper.make_node("Constant", [], ["triton_zero"], value_int=0),
        helper.make_node("Constant", [], ["triton_one"], value_int=1),
        helper.make_node("Constant", [], ["triton_column"], value_ints=[1]),
        helper.make_node("Shape", ["input_ids"], ["triton_shape"]),
        helper.make_node("Gather", ["triton_shape", "triton_one"], ["triton_length"]),
        helper.make_node("Range", ["triton_zero", "triton_length", "triton_one"], ["triton_steps"]),
        helper.make_node("Constant", [], ["triton_vocabulary"], value_ints=[vocab_size]),
        helper.make_node("ConstantOfShape", ["triton_vocabulary"], ["triton_tokens"], value=zero),
        helper.make_node(
            "Less", ["input_ids", "triton_zero"], ["triton_negative"]
        ),  # Gather counts those from the end
        helper.make_node("Where", ["triton_negative", "triton_vocabulary", "input_ids"], ["triton_ids"]),
        helper.make_node("Gather", ["triton_tokens", "triton_ids"], ["triton_known"]),
        helper.make_node("Add", [past, "triton_steps"], ["triton_positions"]),
        helper.make_node("Add", ["triton_positions", "triton_known"], ["position_ids"]),
        helper.make_node("Add", [past, "triton_length"], [present]),
        helper.make_node("Expand", ["triton_column", "triton_shape"], ["attention_mask"]),
        helper.make_node("Sub", ["triton_length", "triton_one"], ["triton_last"]),
        helper.make_node("Mul", [past, "triton_zero"], ["triton_zeros"]),
        helper.make_node("Add", ["triton_zeros", "triton_last"], ["logit_indices"]),
    ]
    infos = [helper.make_tensor_value_info(one, TensorProto.INT64, ["batch", 1]) for one in POSITION]
    change(graph, without=MADE, first=first, last=(), inputs=infos[:1], outputs=infos[1:])


def _config(bundle: Bundle, name: str, backend: str, batch: int, candidates: int, kind: str, sequences: str) -> str:
    """config.pbtxt; dimensions are without the batch."""
    return f"""name: "{name}"
backend: "{backend}"
max_batch_size: {batch}
input [ {{ name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] }} ]
output [
  {{ name: "next_tokens" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "logits" data_type: TYPE_FP32 dims: [ 1, {bundle.manifest.spec.vocab_size} ] }}
]
instance_group [ {{ kind: {kind} count: 1 }} ]
sequence_batching {{
  max_sequence_idle_microseconds: 600000000
  oldest {{ max_candidate_sequences: {candidates} }}
{sequences}
}}
"""


def _state(names: tuple[str, ...], kind: str, shape: Iterable[int]) -> str:
    past, present = names
    dims = ", ".join(map(str, shape))
    start = f'initial_state {{ name: "zero" data_type: {kind} dims: [ {dims} ] zero_data: true }}'
    return f"""
    {{
      input_name: "{past}"
      output_name: "{present}"
      data_type: {kind}
      dims: [ {dims} ]
      {start}
    }}"""
