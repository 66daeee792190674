"""Generation: prefill, then one decode step a token, as a stream of records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import InputError
from .sampling import Sampler, Sampling
from .text import StopStrings

if TYPE_CHECKING:
    from .model import Model
    from .state import State

FinishReason = Literal["stop", "length", "limit"]


@dataclass(frozen=True)
class Record:
    """One generated token.

    text: what it adds to the text; may be empty while a character or a stop string is incomplete.
    token: its id.
    finish_reason: None while there is more to come; `stop` (an end token or stop string), `length`
        (the model has no further positions; `detail` says why) or `limit` (max_tokens reached).
    prompt_tokens, generated: counts so far.
    prefill_rate, decode_rate: tokens a second of the prompt and of the decode steps so far.
    """

    text: str
    token: int
    finish_reason: FinishReason | None
    detail: str | None
    prompt_tokens: int
    generated: int
    prefill_rate: float
    decode_rate: float


def generate(
    model: Model,
    prompt: str | Sequence[int] | np.ndarray,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    ignore_eos: bool = False,
    state: State | None = None,
) -> Iterator[Record]:
    """Continue a prompt.

    Args:
        prompt: text, or token ids as they are. A text that starts a sequence gets the tokenizer's own
            start token (<s> in LLaMA's), one that continues a state does not.
        max_tokens: tokens to generate at most.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `sampling.Sampling`.
        stop: strings that end the text; not part of it.
        stop_tokens: ids that end it, beside the model's own end tokens.
        ignore_eos: do not end at the model's own end tokens.
        state: of batch 1, to continue from; advanced over the prompt and every token but the last.

    Raises:
        InputError: an option or the prompt is out of range; before the first record.
    """
    options = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}, expected at least 1; ask for one or more")
    stops = StopStrings((stop,) if isinstance(stop, str) else stop)
    if stop and not model.has_tokenizer:
        raise InputError("stop strings need a tokenizer and this bundle has none; use stop_tokens")
    state = model.new_state() if state is None else state
    if isinstance(prompt, str):
        prompt = model.tokenizer.encode(prompt, start=state.position[0] == 0)
    ids = np.asarray(prompt)
    if ids.size == 0:
        raise InputError("the prompt is empty, expected at least one token; give some text")
    ends = frozenset(stop_tokens) | (frozenset() if ignore_eos else frozenset(model.spec.eos_token_ids))
    model.check(ids[None], state)
    return _records(model, ids, state, Sampler(options, model.spec.vocab_size), max_tokens, stops, ends)


def _records(
    model: Model,
    ids: np.ndarray,
    state: State,
    sampler: Sampler,
    max_tokens: int,
    stops: StopStrings,
    ends: frozenset[int],
) -> Iterator[Record]:
    text = model.tokenizer.stream(ids.tolist()) if model.has_tokenizer else None
    limit = model.manifest.positions_limit
    started = time.perf_counter()
    sampler.see(ids)
    first, following = _choosers(model, state, sampler)
    token = first(ids[None])
    ready = time.perf_counter()
    for generated in range(1, max_tokens + 1):
        reason: FinishReason | None = None
        piece, met = stops.push(text.push(token) if text and token not in ends else "")
        if met or token in ends:
            reason = "stop"
        elif limit is not None and state.position[0] >= limit:
            reason = "length"
        elif generated == max_tokens:
            reason = "limit"
        if reason and not met:
            rest, met = stops.push(text.flush() if text else "")
            piece += rest if met else rest + stops.flush()
        seconds = time.perf_counter() - ready
        yield Record(
            text=piece,
            token=token,
            finish_reason=reason,
            detail=model.manifest.limit_reason if reason == "length" else None,
            prompt_tokens=len(ids),
            generated=generated,
            prefill_rate=len(ids) / (ready - started),
            decode_rate=(generated - 1) / seconds if generated > 1 else 0.0,
        )
        if reason:
            return
        token = following(token)


def _choosers(
    model: Model, state: State, sampler: Sampler
) -> tuple[Callable[[np.ndarray], int], Callable[[int], int]]:
    """(prompt [1, T] -> the token after it, token -> the one after that).

    The most likely token is picked in the graph: on a GPU logits are expensive to copy, on a CPU they
    are in another core's cache.
    """
    if sampler.is_argmax:
        return lambda ids: model.next_token(ids, state), model.decoder(state).pick
    step = model.decoder(state).logits
    return lambda ids: sampler(model.forward(ids, state)[0]), lambda token: sampler(step(token))
