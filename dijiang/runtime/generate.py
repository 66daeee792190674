"""Generation: prefill, then one decode step a token, as a stream of records.

This is the one loop: what `generate` runs, `bench` measures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from typing import Protocol

import numpy as np

from ..bundle.manifest import Manifest
from ..errors import InputError
from ..models.spec import ModelSpec
from .options import MOST_TOKENS, Generation
from .sampling import Sampler
from .sequence import Limits, Record, Sequence
from .sessions.base import Output, Session
from .snapshot import NONE, Seam
from .state import State
from .step import Step
from .text import StopStrings, TextTokenizer


class Model(Protocol):
    """What is needed of a `model.Model`."""

    @property
    def session(self) -> Session: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def manifest(self) -> Manifest: ...
    @property
    def has_tokenizer(self) -> bool: ...
    @property
    def tokenizer(self) -> TextTokenizer: ...
    def new_state(self, batch: int = 1) -> State: ...
    def check(self, ids: np.ndarray, state: State, real: np.ndarray | None = None, user: object = None) -> None: ...


def generate(
    model: Model,
    prompt: str | Ordered[int] | np.ndarray | None,
    options: Generation,
    state: State | None = None,
) -> Iterator[Record]:
    """Continue a prompt, or a state.

    `generate` of n tokens and then of m, without a prompt and with the same state, give the tokens and the
    text of `generate` of n + m, with any options that are the same for both.

    Args:
        prompt: text, or token ids as they are. A text that starts a sequence gets the tokenizer's own
            start token (<s> in LLaMA's), one that continues a state does not. None: go on where the last
            generation with this state stopped.
        state: of batch 1, to continue from. It is advanced over the prompt and every token but the last,
            which it keeps and the next generation feeds first. Where max_tokens ends the text, what may
            be the start of a character or of a stop string stays in it, too.

    Raises:
        InputError: an option or the prompt is out of range; before the first record.
    """
    if options.stops and not model.has_tokenizer:
        raise InputError("stop strings need a tokenizer and this bundle has none; use stop_tokens")
    keeps, state = state is not None, model.new_state() if state is None else state
    if state.batch != 1:
        raise InputError(f"the state has {state.batch} sequences, expected 1; use new_state()")
    seam = state.seam()
    stops = StopStrings(options.stops, seam.held if seam and prompt is None else "")
    ids = _prompt_ids(model, prompt, state, seam)
    model.check(ids[None], state)
    own = () if options.ignore_eos else model.spec.eos_token_ids
    limits = Limits(
        options.max_tokens,
        model.manifest.positions_limit,
        model.manifest.limit_reason,
        frozenset((*options.stop_tokens, *own)),
        keeps,
    )
    return _records(model, ids, state, options, limits, stops, seam if prompt is None else None)


def _prompt_ids(
    model: Model, prompt: str | Ordered[int] | np.ndarray | None, state: State, seam: Seam | None
) -> np.ndarray:
    """What has to be fed: the token that the last generation left, then the prompt."""
    left = np.array([seam.token] if seam else [], np.int64)
    if prompt is None:
        if not left.size:
            raise InputError(
                "nothing to go on from: the state has no token that was generated and not fed; give a prompt"
            )
        return left
    if isinstance(prompt, str):
        start = bool(state.position[0] == 0)
        given = np.array(model.tokenizer.encode(prompt, start=start), np.int64)
    else:
        given = as_ids(prompt)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise InputError(f"the prompt is {given.dtype} of shape {list(given.shape)}, expected text or token ids")
    if given.size == 0:
        raise InputError("the prompt is empty, expected at least one token; give some text")
    return np.concatenate([left, given])


def as_ids(ids: object) -> np.ndarray:
    """Ids as an array; InputError for rows of different lengths."""
    try:
        found = np.asarray(ids)
    except ValueError as error:
        raise InputError(f"ids are no array ({error}); give rows of one length, with a mask") from error
    return found if found.size else found.astype(np.int64)


def _records(
    model: Model,
    ids: np.ndarray,
    state: State,
    options: Generation,
    limits: Limits,
    stops: StopStrings,
    seam: Seam | None,
) -> Iterator[Record]:
    """generate's stream; a generator, so that nothing runs before the first record is asked for."""

    def begin(started: float) -> Sequence:
        known = state.last[0]
        known = known[known != NONE].tolist()
        opened = None if seam is None else seam.open
        text = model.tokenizer.stream(known, opened) if model.has_tokenizer else None
        sampler = None if options.is_argmax else Sampler(options, state.seen[0].copy())
        return Sequence(
            limits,
            stops,
            sampler,
            text,
            prompt_tokens=len(ids),
            started=started,
        )

    lease = _Lease()
    model.check(ids[None], state, user=lease)
    state.lease(lease)
    try:
        started = time.perf_counter()
        output = prefill(model, ids[None], state)
        for (record,) in decode(model, output, state, [begin(started)]):
            yield record
    finally:
        state.release()


class _Lease:
    """Whoever holds it advances a state; it ends with its generator."""


def prefill(model: Model, ids: np.ndarray, state: State) -> Output:
    """Advance a state over ids [B, T] that were checked; the output of the last token of each row."""
    longest, length = model.session.longest, ids.shape[1]
    for start in range(0, length, longest):
        piece = ids[:, start : start + longest]
        kept = np.full((len(ids), 1), piece.shape[1] - 1)
        output = model.session.run(Step.of(piece, state.position, kept), state)
    return output


def decode(model: Model, output: Output, state: State, sequences: Ordered[Sequence]) -> Iterator[list[Record]]:
    """Records of every sequence of a batch, token by token, until one of them ends.

    output: of the last tokens fed.
    """
    session, rows = model.session, range(state.batch)
    while True:
        position = state.position
        tokens = [sequences[row].choose(output, int(position[row]), row) for row in rows]
        records = [sequences[row].push(tokens[row], int(position[row])) for row in rows]
        for row in rows:
            state.leave(row, sequences[row].seam(tokens[row], int(position[row])))
        yield records
        if any(record.finish_reason for record in records):
            return
        step = session.step(state)
        step.ids[:, 0] = tokens
        step.positions[:, 0] = state.position
        output = session.run(step, state)


def greedy(model: Model, batch: int) -> list[Sequence]:
    """Sequences without an end that take the most likely tokens, as text where there is a tokenizer."""
    return [
        Sequence(
            Limits(MOST_TOKENS),
            StopStrings(()),
            None,
            model.tokenizer.stream() if model.has_tokenizer else None,
            prompt_tokens=1,
            started=time.perf_counter(),
        )
        for _ in range(batch)
    ]
