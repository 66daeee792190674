"""The nodes that a step graph may hold, form by form: (domain, type).

These are the nodes that the writers and passes of `dijiang.graph` write. A bundle that holds another one is
refused before anything runs (`bundle.graphs`). No node here has a graph of its own, calls a function or opens
a file. A new block, activation or scheme adds its nodes here; `tests/bundle/test_graphs.py` says which.
"""

from __future__ import annotations

#: Domains: of ONNX Runtime's own nodes, and of ours.
CONTRIB, DOMAIN, CUDA_DOMAIN = "com.microsoft", "dijiang", "dijiang.cuda"

Nodes = frozenset[tuple[str, str]]


def _of(domain: str, names: str) -> Nodes:
    return frozenset((domain, name) for name in names.split())


#: In every form: embedding, projections, rotary angles, logits.
COMMON = _of("", "Add ArgMax Cast Concat Div Gather GatherND MatMul Mul Reshape Split Sub Unsqueeze")
NORMS = _of("", "LayerNormalization RMSNormalization")
#: Rows of `models.activations`.
ACTIVATIONS = _of("", "Erf HardSwish Identity LeakyRelu Max Min Relu Sigmoid Softplus Sqrt Tanh")
#: The same, norms and rotary embedding as one node each.
FUSED = _of("", "RotaryEmbedding") | _of(
    CONTRIB, "FastGelu Gelu QuickGelu SkipLayerNormalization SkipSimplifiedLayerNormalization"
)
#: Norms as basic nodes.
PLAIN_NORMS = _of("", "Pow ReduceSum Sqrt")
#: Positions in bundles of before.
OLD_POSITIONS = _of("", "Mod")
#: The recurrence as basic nodes.
PLAIN_RECURRENCE = _of("", "CumSum Exp Less Range Shape Softmax Squeeze Transpose")

BASE = COMMON | NORMS | ACTIVATIONS
NATIVE = BASE | FUSED | _of(DOMAIN, "AddNorm MatMul RecurrentStep")
CUDA = BASE | FUSED | _of(CUDA_DOMAIN, "AddNorm RecurrentStep RotaryAngles")
ORT = BASE | FUSED | OLD_POSITIONS | _of("", "Softmax") | _of(CONTRIB, "LinearAttention")
WEBGPU = ORT - OLD_POSITIONS | _of("", "ReduceMean")
PRIMITIVE = BASE | PLAIN_NORMS | OLD_POSITIONS | PLAIN_RECURRENCE
ONNX = BASE | PLAIN_NORMS | _of("", "LinearAttention Softmax")

#: What ways to store weights add.
NBITS = _of(CONTRIB, "GatherBlockQuantized MatMulNBits")
DEQUANTIZE = _of("", "DequantizeLinear")
