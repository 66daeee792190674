"""How a layer looks back: strategies that are handed to the graph writer, one object a graph.

Each is made as `strategy(writer)` and has the methods of `Layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import onnx_ir as ir

from ...models.decay import Decay
from ...models.spec import ModelSpec
from ...models.weights import Weights
from ..builder import GraphBuilder
from ..roles import Role


class Source(Protocol):
    """What a graph is written of: a `DijiangModel`, or a Transformer without decays."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def weights(self) -> Weights: ...
    @property
    def decays(self) -> tuple[Decay, ...]: ...
    @property
    def positions_limit(self) -> int | None: ...


class Frame(Protocol):
    """What a layer sees of the graph writer; see `writer.Writer`."""

    model: Source
    spec: ModelSpec
    b: GraphBuilder
    fused: bool
    ragged: bool
    step: list[str | int]

    @property
    def positions(self) -> ir.Value: ...
    def weight(self, module: str, role: Role, layer: int | None = None) -> ir.Value: ...
    def linear(
        self, module: str, x: ir.Value, layer: int | None = None, role: Role = Role.PROJECTION
    ) -> ir.Value: ...
    def norm(self, module: str, x: ir.Value, layer: int | None = None) -> ir.Value: ...


class Layer(Protocol):
    """One way to write the layers of a model."""

    def declare(self) -> None:
        """Declare the inputs that it needs beside the token ids, and what all layers share."""

    def attention(self, layer: int, x: ir.Value) -> ir.Value:
        """The attention block of a layer, output projection included: [B, T, d] to [B, T, d]."""

    def block(self, layer: int, x: ir.Value) -> ir.Value | None:
        """The whole layer, residual sums included; None: the writer puts it together."""

    def finish(self) -> None:
        """Declare the outputs that carry the state on."""


Strategy = Callable[[Frame], Layer]
