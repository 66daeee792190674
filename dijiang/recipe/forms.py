"""Forms of the step graph, and the ways that it stores weights: two tables."""

from __future__ import annotations

from dataclasses import dataclass

from ..nodes import CUDA, CUDA_DOMAIN, DEQUANTIZE, DOMAIN, NATIVE, NBITS, ONNX, ORT, PRIMITIVE, WEBGPU, Nodes
from .precisions import TYPE_BYTES


@dataclass(frozen=True)
class Scheme:
    """How weights are stored in a graph.

    code: the class that writes them, see `graph.schemes`.  nodes: that it adds to a form.
    type: of the rest of the graph; None: as the precision says.  tunable: head precision, block size and
    calibration can be chosen.  mixed: input channels are mixed before they are rounded.  input_bits: of the inputs
    of projections, rounded in the weights' blocks; None: they have the type.
    """

    code: str
    nodes: Nodes = frozenset()
    type: str | None = None
    tunable: bool = False
    mixed: bool = False
    input_bits: int | None = None


#: floats: as they are.  nbits: MatMulNBits, activations rounded to 8 bits by blocks, as the CPU's kernels
#: do.  nbits_gpu: the same weights, activations in fp16.  dequantize: DequantizeLinear before a MatMul,
#: the form that TensorRT's parsers fuse.
SCHEMES = {
    "floats": Scheme("dijiang.graph.schemes:Floats"),
    "nbits": Scheme("dijiang.graph.schemes.nbits:NBits", NBITS, "fp32", tunable=True, mixed=True, input_bits=8),
    "nbits_gpu": Scheme("dijiang.graph.schemes.nbits:GpuNBits", NBITS, "fp16", tunable=True, mixed=True),
    "dequantize": Scheme("dijiang.graph.schemes.dequantize:Dequantize", DEQUANTIZE, "fp16"),
}


@dataclass(frozen=True)
class Graph:
    """A form of the step graph.

    file: its name in a bundle.  layer: the strategy that writes a layer, see `graph.layers`.
    nodes: that it may hold; another one is refused before anything runs.
    onnxruntime: oldest version that runs it; integers_from: the same with weights in blocks.
    fused: norms, rotary embedding and activations are ONNX Runtime's own single nodes.  in_place: the
    new state may be written over the old one.  ragged: a step may hold pieces of several sequences, each of its
    own length; a graph of before may not.  exact: norms subtract the mean in nodes of their own, and
    matmuls of blocks do not round activations.  on_device: a GPU runs every node, none computes shapes on the
    CPU.  operators: domain of the nodes that the library compiled with dijiang has; empty: it needs none.
    matmul: blocks are multiplied by such a node.  own_kernels: on a GPU those nodes are compiled when it is opened.
    types: of its activations.
    """

    help: str
    file: str
    layer: str
    nodes: Nodes
    opset: int
    onnxruntime: tuple[int, int]
    fused: bool = False
    in_place: bool = False
    ragged: bool = False
    exact: bool = False
    on_device: bool = True
    operators: str = ""
    matmul: bool = False
    own_kernels: bool = False
    types: tuple[str, ...] = tuple(TYPE_BYTES)
    integers_from: tuple[int, int] = (0, 0)


#: The best on a CPU first: `load` takes the first that runs.
GRAPHS = {
    "native": Graph(
        "fastest on a CPU, with the operator that is compiled when dijiang is installed",
        file="model.native.onnx",
        layer="dijiang.graph.layers.native:NativeLayer",
        nodes=NATIVE,
        opset=23,
        onnxruntime=(1, 23),
        fused=True,
        in_place=True,
        ragged=True,
        operators=DOMAIN,
        matmul=True,
        types=("fp32",),
    ),
    "ort": Graph(
        "onnxruntime 1.30 or newer, CPU and CUDA",
        file="model.onnx",
        layer="dijiang.graph.layers.recurrent:contrib",
        nodes=ORT,
        opset=23,
        onnxruntime=(1, 30),
        fused=True,
        in_place=True,
    ),
    "webgpu": Graph(
        "any GPU, by WebGPU: what its kernels compute too coarsely is in other nodes",
        file="model.webgpu.onnx",
        layer="dijiang.graph.layers.recurrent:contrib",
        nodes=WEBGPU,
        opset=23,
        onnxruntime=(1, 30),
        fused=True,
        exact=True,
        types=("fp32",),
    ),
    "primitive": Graph(
        "basic nodes of opset 17, or 21 in int8 and int4, for TensorRT and old onnxruntime",
        file="model.primitive.onnx",
        layer="dijiang.graph.layers.recurrent:primitive",
        nodes=PRIMITIVE,
        opset=17,
        onnxruntime=(1, 15),
        on_device=False,
        integers_from=(1, 19),  # 1.18 loads blocks and fails in the first step
    ),
    "onnx": Graph(
        "the standard LinearAttention function of opset 27",
        file="model.opset27.onnx",
        layer="dijiang.graph.layers.recurrent:standard",
        nodes=ONNX,
        opset=27,
        onnxruntime=(1, 32),
    ),
    "cuda": Graph(
        "fastest on CUDA, with kernels that are compiled for the GPU at hand",
        file="model.cuda.onnx",
        layer="dijiang.graph.layers.native:CudaLayer",
        nodes=CUDA,
        opset=23,
        onnxruntime=(1, 30),
        fused=True,
        operators=CUDA_DOMAIN,
        own_kernels=True,
    ),
}
