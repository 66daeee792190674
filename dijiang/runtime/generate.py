"""Generation: prefill, then one decode step a token, as a stream of records.

This is the one loop: what `generate` runs, `bench` measures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..bundle.manifest import Manifest
from ..errors import InputError
from ..models.spec import ModelSpec
from ..progress import Progress, silent
from .drafts import can_speculate, decode_drafts
from .grammar import Grammar
from .options import MOST_TOKENS, Generation
from .sampling import NO_BIAS, Sampler
from .sequence import Limits, Record, Sequence
from .sessions.base import Output, Session
from .snapshot import NONE, Seam
from .state import State, as_state
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
    progress: Progress = silent,
    grammar: Grammar | None = None,
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
            be the start of a character or of a stop string stays in it, too. A copy or a file of it between
            two records has every token but the last of them, too. What ends within a step, as by Ctrl-C, leaves a
            whole state, but no token to go on from: keep a clone, or give a prompt.
        progress: told of the tokens of a prompt that goes in in pieces.
        grammar: that the text follows from its first token on, of `Model.grammar`.

    Raises:
        InputError: an option or the prompt is out of range; before the first record.
        SessionError: a step failed, or its logits hold NaN.
    """
    keeps, state = state is not None, model.new_state() if state is None else as_state(state)
    return stream(model, prepare(model, prompt, options, state, keeps=keeps, grammar=grammar), state, progress)


@dataclass(frozen=True)
class Plan:
    """A generation that was checked: what is fed, and how its tokens are chosen.

    ids: [T] int64, the token that was left in the state included.  position: of the state that they are for.
    seam: to take the text up from.
    bias: added to the logits, by token id.  grammar: of the text.
    """

    ids: np.ndarray
    position: int
    options: Generation
    limits: Limits
    stops: tuple[str, ...]
    seam: Seam | None
    bias: Mapping[int, float]
    grammar: Grammar | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.options.is_argmax and not self.bias and self.grammar is None

    def begin(self, model: Model, state: State, started: float) -> Sequence:
        """The sequence of tokens after the ids were fed to the state (batch 1); started: when that began."""
        known = state.last[0]
        known = known[known != NONE].tolist()
        opened, held = (None, "") if self.seam is None else (self.seam.open, self.seam.held)
        text = model.tokenizer.stream(known, opened) if model.has_tokenizer else None
        matcher = None if self.grammar is None else self.grammar.begin()
        counts = b"" if self.seam is None else self.seam.counts
        sampler = None if self.is_plain else Sampler(self.options, state.seen[0].copy(), self.bias, matcher, counts)
        stops = StopStrings(self.stops, held)
        return Sequence(self.limits, stops, sampler, text, prompt_tokens=len(self.ids), started=started)


def prepare(
    model: Model,
    prompt: str | Ordered[int] | np.ndarray | None,
    options: Generation,
    state: State,
    *,
    keeps: bool,
    bias: Mapping[int, float] = NO_BIAS,
    grammar: Grammar | None = None,
) -> Plan:
    """Check a generation; nothing runs. See `generate`.

    keeps: whether the caller goes on from the state, see `Limits`.  grammar: its end is an end token.

    Raises:
        InputError: an option, the prompt or the state is out of range.
    """
    if grammar is not None and prompt is None:
        raise InputError("a grammar is of a whole text, and there is no prompt; give one, or leave the grammar out")
    if options.stops and not model.has_tokenizer:
        raise InputError("stop strings need a tokenizer and this bundle has none; use stop_tokens")
    StopStrings(options.stops)
    if state.batch != 1:
        raise InputError(f"the state has {state.batch} sequences, expected 1; use new_state()")
    if unknown := [token for token in bias if not 0 <= token < model.spec.vocab_size]:
        raise InputError(
            f"the bias is for token id {unknown[0]}, expected 0 to {model.spec.vocab_size - 1}; change the bias"
        )
    if unknown := [token for token in options.stop_tokens if token >= model.spec.vocab_size]:
        raise InputError(
            f"stop_tokens has {unknown[0]}, expected ids from 0 to {model.spec.vocab_size - 1}; change the option"
        )
    if not all(math.isfinite(amount) for amount in bias.values()):
        raise InputError("the bias holds NaN or infinity, expected numbers; change the bias")
    seam = state.seam()
    ids = _prompt_ids(model, prompt, state, seam)
    model.check(ids[None], state)
    own = () if options.ignore_eos and grammar is None else model.spec.eos_token_ids
    limits = Limits(
        options.max_tokens,
        model.manifest.positions_limit,
        model.manifest.limit_reason,
        frozenset((*options.stop_tokens, *own, *_special(model, options.stops))),
        keeps,
    )
    plan = Plan(
        ids, int(state.position[0]), options, limits, options.stops, seam if prompt is None else None, bias, grammar
    )
    if options.speculate and not (plan.is_plain and can_speculate(model.manifest, model.session.graph)):
        raise InputError(
            "speculate needs the most likely token of int8 or int4 in the native graph, where drafts change no "
            "bit; leave it out"
        )
    return plan


def _special(model: Model, stops: Ordered[str]) -> list[int]:
    """Ids of stop strings that are special tokens: no text shows those."""
    return [] if not stops else model.tokenizer.special_ids(stops)


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
    """Ids as an array, of int64 if they are integers; InputError for rows of different lengths."""
    try:
        found = np.asarray(ids)
    except (ValueError, TypeError, RuntimeError) as error:  # torch has types that NumPy lacks
        raise InputError(f"ids are no array ({error}); give rows of one length, with a mask") from error
    if found.dtype == np.uint64:  # what int64 does not hold, no vocabulary has
        found = np.minimum(found, np.iinfo(np.int64).max)
    return found.astype(np.int64, copy=False) if found.dtype.kind in "iu" or not found.size else found


def stream(model: Model, plan: Plan, state: State, progress: Progress = silent) -> Iterator[Record]:
    """The records of a plan; a generator, so that nothing runs before the first one is asked for."""
    with state.leased() as user:
        model.check(plan.ids[None], state, user=user)
        if (position := int(state.position[0])) != plan.position:
            raise InputError(
                f"the state is at position {position} by now, was at {plan.position} when this generation was "
                "made; call generate again"
            )
        started = time.perf_counter()
        output = prefill(model, plan.ids[None], state, progress)
        sequence = plan.begin(model, state, started)
        if plan.options.speculate:
            limit = plan.limits.positions
            yield from decode_drafts(model.session, output, state, sequence, plan.ids.tolist(), limit)
        else:
            for (record,) in decode(model, output, state, [sequence]):
                yield record


def prefill(model: Model, ids: np.ndarray, state: State, progress: Progress = silent) -> Output:
    """Advance a state over ids [B, T] that were checked; the output of the last token of each row."""
    longest, length = model.session.longest, ids.shape[1]
    for start in range(0, length, longest):
        piece = ids[:, start : start + longest]
        kept = np.full((len(ids), 1), piece.shape[1] - 1)
        output = model.session.run(Step.of(piece, state.position, kept), state)
        if length > longest:
            progress("prompt", start + piece.shape[1], length)
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
