"""What Triton's Python backend runs: a bundle, and the state of every sequence; see `triton.write`."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # the server's own

from .. import InputError, State, load


@dataclass(frozen=True)
class Request:
    """More ids [T] of a sequence; whether it starts and ends with them."""

    sequence: int
    ids: np.ndarray
    starts: bool
    ends: bool

    @classmethod
    def of(cls, request: Any) -> Request:
        """One of Triton's."""
        names = ("CORRID", "input_ids", "START", "END")
        sequence, ids, starts, ends = (triton.get_input_tensor_by_name(request, n).as_numpy()[0] for n in names)
        return cls(int(sequence[0]), ids, bool(starts[0]), bool(ends[0]))


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that lies beside model.py."""
        self.model = load(Path(args["model_repository"], args["model_version"], "bundle"))
        batching = json.loads(args["model_config"])["sequence_batching"]
        self.most = int(batching["oldest"]["max_candidate_sequences"])
        #: Of each sequence, the one that went on last at the end.
        self.states: OrderedDict[int, State] = OrderedDict()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """An answer to each request; those with as many ids go through the graph together."""
        answers: list[Any] = [None] * len(requests)
        together: dict[int, list[tuple[int, Request]]] = defaultdict(list)
        for at, request in enumerate(map(Request.of, requests)):
            try:
                self._check(request)
                together[len(request.ids)].append((at, request))
            except InputError as error:
                answers[at] = triton.InferenceResponse([], triton.TritonError(str(error)))
                if request.starts or request.ends:  # what follows would go on from another text
                    self.states.pop(request.sequence, None)
        for group in together.values():
            logits = self._forward([request for _, request in group])
            for (at, _), row in zip(group, logits[:, None, None], strict=True):
                tokens = row.argmax(-1)
                outputs = [triton.Tensor("next_tokens", tokens), triton.Tensor("logits", row)]
                answers[at] = triton.InferenceResponse(outputs)
        return answers

    def _check(self, request: Request) -> None:
        """InputError unless the sequence can go on; a new one has a state afterwards."""
        state = self.model.new_state() if request.starts else self.states.get(request.sequence)
        if state is None:
            raise InputError(
                f"sequence {request.sequence} has no state: it ended, or others took its place; start it again"
            )
        self.model.check(request.ids[None], state)
        self.states[request.sequence] = state
        self.states.move_to_end(request.sequence)

    def _forward(self, requests: Sequence[Request]) -> np.ndarray:
        """Logits [N, vocab] after the ids, as many of each sequence."""
        states = [self.states[request.sequence] for request in requests]
        state, *others = states
        if others:
            memory = [np.empty((len(states), *layer.shape[1:]), np.float32) for layer in state.layers]
            state = State.gathered([(one, 0) for one in states], memory)
        logits = self.model.forward(np.stack([request.ids for request in requests]), state)
        for row, request in enumerate(requests):
            if request.ends:
                del self.states[request.sequence]
            elif others:
                self.states[request.sequence] = state.take([row])
        while len(self.states) > self.most:
            self.states.popitem(last=False)
        return logits
