"""What a bundle is made of, decided once: the tables, and `resolve`.

Rows are data. Where a row stands for code it names it by import path, so that the runtime can read the
tables without importing onnx. A new precision, graph, weight scheme or target is one row here and, where
it does something new, one function. Nothing else compares their names: code asks the `Recipe` that
`export` resolved and the manifest keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

from .errors import BundleError, ExportError
from .nodes import CUDA, CUDA_DOMAIN, DEQUANTIZE, DOMAIN, NATIVE, NBITS, ONNX, ORT, PRIMITIVE, WEBGPU, Nodes

#: Bytes of a number of each floating-point type that weights and activations can have.
TYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
#: How many times further from float64 a graph may be than the float32 reference is on the same tokens:
#: 0.9 to 2.6 on random models of every family, 0.6 to 1.3 on SmolLM2 and on the trained example. Planted faults: 80
#: and more (ADR 0019).
FLOAT32_FACTOR = 8.0
#: The same of a graph in 16 bits, or with weights in blocks, over the reference that is rounded as plainly as
#: can be (`parity.rounded`). Right graphs in 16 bits: states 0.4 to 3.9, logits 0.5 to 2.8; in blocks 0.1 to 2.0
#: (ADR 0042).
STATES_16_BITS, LOGITS_16_BITS, IN_BLOCKS = 8.0, 4.0, 3.0
#: Input channels that share one scale, and that are mixed before they are rounded (ADR 0024). Bytes of a
#: scale (ADR 0039).
BLOCK, ROTATION, SCALE = 64, 64, 2
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Blocks:
    """Weights as integers of `bits`; `block` consecutive input channels share a scale.

    rotation: input channels that a Hadamard matrix mixes before rounding, a power of two; where it does
        not divide the width, the largest that does. 0: none.
    scale_bytes: 2, scales are bfloat16; 4, float32, as in bundles of before.
    """

    bits: int
    block: int
    rotation: int = 0
    scale_bytes: int = 4

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight, its share of the scale included."""
        return self.bits / 8 + self.scale_bytes / self.block


@dataclass(frozen=True)
class Budget:
    """A size that the weights may have, and the projections that keep more bits within it (ADR 0038).

    bytes: of all weights, at most.  blocks: how those projections are stored.  kept: names of their weights.
    """

    bytes: int
    blocks: Blocks
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """One bound of a verification: `metric` must not exceed it, where it was measured."""

    metric: str
    bound: float


def over_rounding(states: float, logits: float) -> tuple[Gate, ...]:
    """What rounding may cost, in units of what it costs this model at its plainest; KL grows as the square."""
    return (
        Gate("state_over_rounding", states),
        Gate("error_over_rounding", logits),
        Gate("kl_over_rounding", logits**2),
    )


@dataclass(frozen=True)
class Precision:
    """How weights are stored and what the result must meet.

    type: of the activations, and of every weight that is not in blocks.  body, head, embed: the
    projections of the layers, the head and the embedding as blocks of integers; None: in `type`.
    kept: the projections that a budget leaves more bits; None: it has no budget.
    gates: metrics are the keys of `parity.verify.Parity.metrics`; those about a text are None without
    one.  seconds: to write 10^9 weights on 2 cores (docs/models.md).
    turing: TensorRT-RTX has its matmul for GPUs of compute capability 7.5.
    """

    help: str
    gates: tuple[Gate, ...]
    type: str = "fp32"
    body: Blocks | None = None
    head: Blocks | None = None
    embed: Blocks | None = None
    kept: Blocks | None = None
    seconds: float = 18.0
    turing: bool = False

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight of the layers."""
        return TYPE_BYTES[self.type] if self.body is None else self.body.weight_bytes


PRECISIONS = {
    "fp32": Precision(
        "as exact as the checkpoint",
        (Gate("error_over_float32", FLOAT32_FACTOR), Gate("step_over_float32", FLOAT32_FACTOR)),
    ),
    "fp16": Precision(
        "16-bit weights and activations, for GPUs",
        over_rounding(STATES_16_BITS, LOGITS_16_BITS),
        type="fp16",
        turing=True,
    ),
    "bf16": Precision(
        "as fp16, with the range of float32",
        over_rounding(STATES_16_BITS, LOGITS_16_BITS),
        type="bf16",
    ),
    # Gross errors, whatever the twin says: the states of the first two layers are 0.003 to 0.04 off (int8),
    # 0.02 to 0.37 (int4) in every family; channels in a wrong place make it 1.4. Depth amplifies the rounding of
    # random weights: the logits of LLaMA2-7B in int4 are 1.07 off, and 1.4 means that nothing is left.
    "int8": Precision(
        "8-bit weights in blocks",
        (*over_rounding(IN_BLOCKS, IN_BLOCKS), Gate("early_state_error", 0.1), Gate("rms_relative_error", 0.7)),
        body=Blocks(8, BLOCK, ROTATION, SCALE),
        head=Blocks(8, BLOCK, ROTATION, SCALE),
        embed=Blocks(8, BLOCK, 0, SCALE),
        seconds=14.0,
        turing=True,
    ),
    # The head keeps 8 bits: rounding it changes the most likely token most (ADR 0009).
    "int4": Precision(
        "4-bit weights in blocks, the head in 8",
        (*over_rounding(IN_BLOCKS, IN_BLOCKS), Gate("early_state_error", 0.6), Gate("rms_relative_error", 1.3)),
        body=Blocks(4, BLOCK, ROTATION, SCALE),
        head=Blocks(8, BLOCK, ROTATION, SCALE),
        embed=Blocks(4, BLOCK, 0, SCALE),
        kept=Blocks(8, BLOCK, ROTATION, SCALE),
        seconds=40.0,
    ),
}


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


@dataclass(frozen=True)
class Provider:
    """One way to run a bundle.

    open: its constructor, called as (bundle, graph, detail, device, options: `runtime.options.Loading`).
    graphs, schemes: what it runs.  refused: type of activations -> why it does not run that.
    detail: what the constructor needs to know.
    auto: (bundle, name) -> whether `auto` takes it here; None: only when asked for.  trial: and only if it is
    faster than what comes next.  proven: on what its kernels have run for this project; empty: built only.
    numbered: it may be followed by :N.  onnxruntime: it runs graphs with it.
    emulated: verification rounds 16-bit types on it as a GPU would.
    """

    open: str
    graphs: tuple[str, ...]
    schemes: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)
    detail: str | None = None
    auto: str | None = None
    trial: bool = False
    proven: str = ""
    numbered: bool = True
    onnxruntime: bool = True
    emulated: bool = False

    @property
    def types(self) -> tuple[str, ...]:
        """Of activations, that it runs."""
        return tuple(name for name in TYPE_BYTES if name not in self.refused)


SESSIONS = "dijiang.runtime.sessions"
#: `auto` takes the last that it can.
PROVIDERS = {
    "cpu": Provider(
        f"{SESSIONS}.cpu:open_cpu",
        graphs=tuple(GRAPHS),
        schemes=tuple(SCHEMES),
        refused={"bf16": "ONNX Runtime has no bfloat16 kernels for the CPU"},
        proven="x86-64",
        auto=f"{SESSIONS}.providers:always",
        numbered=False,
        emulated=True,
    ),
    "webgpu": Provider(
        f"{SESSIONS}.device_session:open_device",
        graphs=("webgpu",),
        schemes=("floats", "nbits"),
        refused={
            # tiny-python, 1,024 tokens of its text; 2.8 times on the CPU, that rounds as a GPU would.
            "fp16": "it sums in 16 bits: on the example an error of 20 times plain rounding's, allowed 4",
            "bf16": "WebGPU has no bfloat16",
        },
        detail=f"{SESSIONS}.webgpu:WEBGPU",
        auto=f"{SESSIONS}.webgpu:has_gpu",
        trial=True,
        proven="Mesa's lavapipe, a Vulkan driver in software (`make gpu`), and an NVIDIA H200",
        numbered=False,
    ),
    "cuda": Provider(
        f"{SESSIONS}.device_session:open_device",
        graphs=("cuda", "ort", "primitive", "onnx"),
        schemes=("floats", "nbits_gpu"),
        detail=f"{SESSIONS}.device:CUDA",
        proven="an NVIDIA H200",
        auto=f"{SESSIONS}.providers:has_provider",
    ),
    "ort-tensorrt": Provider(
        f"{SESSIONS}.device_session:open_device",
        graphs=("ort", "primitive", "onnx"),
        schemes=("floats", "nbits_gpu", "dequantize"),
        detail=f"{SESSIONS}.device:ORT_TENSORRT",
    ),
    "ort-tensorrt-rtx": Provider(
        f"{SESSIONS}.device_session:open_device",
        graphs=("ort", "primitive", "onnx"),
        schemes=("floats", "nbits_gpu", "dequantize"),
        detail=f"{SESSIONS}.device:ORT_TENSORRT_RTX",
    ),
    **{
        name: Provider(
            f"{SESSIONS}.tensorrt:open_engine",
            graphs=("primitive",),
            schemes=("floats", "dequantize"),
            auto=f"{SESSIONS}.providers:has_engine",
            onnxruntime=False,
        )
        for name in ("tensorrt_rtx", "tensorrt")
    },
}


@dataclass(frozen=True)
class Target:
    """What a bundle is written for.

    graphs: what it may hold, the best first.  blocks: graph -> scheme of weights in blocks of integers.
    others: other graphs may be asked for, too.
    """

    help: str
    graphs: tuple[str, ...]
    blocks: dict[str, str]
    others: bool = False


TARGETS = {
    "onnxruntime": Target(
        "the CPU; fp32, fp16 and bf16 on GPUs, too",
        ("native", "ort", "webgpu", "primitive", "cuda"),
        {"native": "nbits", "ort": "nbits", "webgpu": "nbits", "primitive": "dequantize"},
        others=True,
    ),
    "cuda": Target(
        "int8 and int4 with activations in fp16", ("cuda", "ort"), dict.fromkeys(("cuda", "ort"), "nbits_gpu")
    ),
    "tensorrt": Target("for dijiang build", ("primitive",), {"primitive": "dequantize"}),
}
#: Precisions of the head -> bits; None: not in blocks.
HEADS = {name: row.body.bits if row.body else None for name, row in PRECISIONS.items() if row.type == "fp32"}
AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """What one bundle is made of; its manifest keeps it.

    type: of activations and of weights that are not in blocks.  scheme: a row of SCHEMES.
    graphs: rows of GRAPHS, the best first; they share every weight.
    calibration_tokens: to round by; None: as many as pay.  budget: None: every projection is as `body` says.
    """

    precision: str
    target: str
    type: str
    scheme: str
    graphs: tuple[str, ...]
    gates: tuple[Gate, ...]
    body: Blocks | None = None
    head: Blocks | None = None
    embed: Blocks | None = None
    calibration_tokens: int | None = None
    budget: Budget | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether weights are blocks of integers."""
        return self.body is not None

    def providers(self, graph: str) -> tuple[str, ...]:
        """What may run one of its graphs."""
        return tuple(
            name
            for name, row in PROVIDERS.items()
            if graph in row.graphs and self.scheme in row.schemes and self.type in row.types
        )

    def onnxruntime(self, graph: str) -> tuple[int, int]:
        """The oldest version that runs one of its graphs."""
        row = GRAPHS[graph]
        return max(row.onnxruntime, row.integers_from) if self.in_blocks else row.onnxruntime

    def projection(self, name: str) -> Blocks | None:
        """How the projection with a weight of this name is stored."""
        return self.budget.blocks if self.budget is not None and name in self.budget.kept else self.body

    @property
    def title(self) -> str:
        """Its precision, and what a budget was spent on, in a few words."""
        if self.budget is None:
            return self.precision
        spent = f"{len(self.budget.kept)} projections in {self.budget.blocks.bits} bits"
        return f"{self.precision} within {self.budget.bytes / 1e6:,.1f} MB: {spent}"

    def keeping(self, kept: Iterable[str]) -> Recipe:
        """With the projections that its budget is spent on, by the names of their weights."""
        assert self.budget is not None
        return replace(self, budget=replace(self.budget, kept=tuple(kept)))

    def fitted(self, embed: Blocks | None, tokens: int) -> Recipe:
        """With what depends on a model's shape: how its embedding is stored, and the tokens to round by."""
        return replace(self, embed=embed, calibration_tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Read what `to_dict` wrote; BundleError for anything else."""
        try:
            blocks = {
                name: None if data[name] is None else Blocks(**data[name]) for name in ("body", "head", "embed")
            }
            gates = tuple(Gate(str(g["metric"]), float(g["bound"])) for g in data["gates"])
            graphs = tuple(str(name) for name in data["graphs"])
            spent = data.get("budget")  # no bundle before 0.3 has one
            budget = None if spent is None else _budget(**spent)
            found = cls(**{**data, **blocks, "gates": gates, "graphs": graphs, "budget": budget})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"recipe: not a whole one ({error}); export the bundle again") from error
        for what, value, rows in (
            ("graph", graphs, GRAPHS),
            ("scheme", (found.scheme,), SCHEMES),
            ("type", (found.type,), TYPE_BYTES),
        ):
            if unknown := [name for name in value if name not in rows]:
                raise BundleError(f"recipe: {what} {unknown[0]!r} is unknown; upgrade dijiang")
        return found


def _budget(bytes: int, blocks: dict[str, Any], kept: Iterable[str]) -> Budget:
    return Budget(bytes, Blocks(**blocks), tuple(map(str, kept)))


def named(path: str) -> Any:
    """What a row names by import path, `module:name`. Paths come from the tables, never from files."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def require(what: str, value: str, known: Iterable[str]) -> None:
    """ExportError unless a name is one of those known."""
    known = list(known)
    if value not in known:
        raise ExportError(f"{what} {value!r} is unknown, expected one of {', '.join(known)}")


def resolve(
    precision: str = "fp32",
    *,
    graph: str = AUTO,
    target: str = "onnxruntime",
    head_precision: str | None = None,
    block_size: int | None = None,
    calibration_tokens: int | None = None,
    budget: float | None = None,
    runs_here: Callable[[str], bool] = lambda name: True,
) -> Recipe:
    """Decide what a bundle is made of.

    Args:
        graph: only this one; `auto`: those of the target that run here and share all weights.
        head_precision, block_size, calibration_tokens: None: as the precision says.
        budget: MB that the weights may have; None: projections are all alike.
        runs_here: whether this machine runs a graph, so that it can be verified.

    Raises:
        ExportError: an unknown name, or choices that do not go together.
    """
    require("precision", precision, PRECISIONS)
    require("target", target, TARGETS)
    require("graph", graph, (AUTO, *GRAPHS))
    row, goal = PRECISIONS[precision], TARGETS[target]
    choices = {name: _variant(row, goal, name) for name in _candidates(row, goal, graph, target)}
    first = next((name for name in choices if runs_here(name)), next(iter(choices)))
    scheme = _scheme(row, goal, first, precision)
    recipe = Recipe(
        precision=precision,
        target=target,
        type=SCHEMES[scheme].type or row.type,
        scheme=scheme,
        graphs=tuple(
            name
            for name, variant in choices.items()
            if name == first or (variant == choices[first] and runs_here(name))
        ),
        gates=row.gates,
        body=row.body,
        head=row.head,
        embed=row.embed,
    )
    tuned = _tuned(recipe, head_precision, block_size, calibration_tokens)
    return tuned if budget is None else with_budget(tuned, budget)


def _candidates(row: Precision, goal: Target, graph: str, target: str) -> list[str]:
    """Graphs that may be written."""
    found = [name for name in goal.graphs if row.type in GRAPHS[name].types]
    if graph == AUTO:
        return found
    if row.type not in GRAPHS[graph].types:
        raise ExportError(
            f"the {graph} graph has activations in {' or '.join(GRAPHS[graph].types)} only, not in {row.type}; "
            "leave --graph out, or export with --precision int8"
        )
    if graph not in goal.graphs and not goal.others:
        raise ExportError(
            f"target {target} needs the {' or '.join(goal.graphs)} graph, not {graph}; leave --graph out"
        )
    return [graph]


def _variant(row: Precision, goal: Target, graph: str) -> tuple[object, ...]:
    """What decides the weights' bytes: graphs of one variant share them all."""
    scheme = SCHEMES[goal.blocks.get(graph, "floats") if row.body else "floats"]
    type_ = scheme.type or row.type
    # In 16 bits a graph of single nodes stores other norms' weights in the type than one that is not.
    return scheme.code, type_, GRAPHS[graph].fused if type_ != "fp32" else None


def _scheme(row: Precision, goal: Target, graph: str, precision: str) -> str:
    if row.body is None:
        return "floats"
    if graph not in goal.blocks:
        raise ExportError(
            f"precision {precision} needs one of the graphs {', '.join(goal.blocks)}, not {graph}; "
            "leave --graph out, or export with --precision fp32"
        )
    return goal.blocks[graph]


def _tuned(recipe: Recipe, head: str | None, block: int | None, tokens: int | None) -> Recipe:
    """The recipe with the head's precision, the block size and the calibration that were asked for."""
    if head is not None:
        require("head precision", head, HEADS)
    if block is not None and (block not in BLOCKS or not isinstance(block, int)):
        raise ExportError(f"block size {block!r} is unknown, expected one of {', '.join(map(str, BLOCKS))}")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 0):
        raise ExportError(f"calibration tokens {tokens!r}, expected a whole number, 0 or more; change them")
    if not recipe.in_blocks:
        if head is not None or block is not None or tokens:
            raise ExportError(
                f"precision {recipe.precision} has no head precision, block size or calibration; use --precision "
                "int8 or int4"
            )
        return recipe
    if (head or block or tokens) and not SCHEMES[recipe.scheme].tunable:
        raise ExportError(
            "--head-precision, --block-size and --calibration-tokens have no meaning in the "
            f"{recipe.graphs[0]} graph, whose blocks are what TensorRT reads; leave them out"
        )
    body, kept, embed = (
        None if blocks is None else replace(blocks, block=block or blocks.block)
        for blocks in (recipe.body, recipe.head, recipe.embed)
    )
    if head is not None:
        bits = HEADS[head]
        kept = None if bits is None else Blocks(bits, block or BLOCK, ROTATION, SCALE)
    return replace(recipe, body=body, head=kept, embed=embed, calibration_tokens=tokens)


def with_budget(recipe: Recipe, megabytes: float) -> Recipe:
    """The recipe with a size that its weights may have; what that is spent on is measured later.

    ExportError where all projections are alike, or for a size that is none.
    """
    kept = PRECISIONS[recipe.precision].kept
    if kept is None or recipe.body is None or not SCHEMES[recipe.scheme].tunable:
        able = " or ".join(name for name, row in PRECISIONS.items() if row.kept is not None)
        raise ExportError(
            f"a budget has no meaning in precision {recipe.precision} and the {recipe.graphs[0]} graph: "
            f"all weights of one kind are alike there; use --precision {able}, or leave --budget out"
        )
    if not 0 < megabytes < math.inf:
        raise ExportError(f"budget {megabytes!r} MB, expected more than 0; give the MB that the weights may have")
    blocks = replace(kept, block=recipe.body.block)
    return replace(recipe, budget=Budget(round(megabytes * 1e6), blocks))
