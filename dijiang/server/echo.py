"""A prompt as the beginning of its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

from ..runtime.text import TextTokenizer
from .relay import Job, Nats
from .wanted import Wanted


class Echo:
    """What an answer of `/v1/completions` repeats; worked out when it is asked for, which takes a while.

    Args:
        ids: of the prompt, as they were fed.
        nats: of each of them but the first, which follows nothing; empty: not asked for. They come while it is fed.
        given: the prompt, where it was text.
        tokenizer: None: there is none, and ids stay ids.
    """

    def __init__(
        self, ids: Sequence[int], nats: Sequence[Nats], given: str | None, tokenizer: TextTokenizer | None
    ) -> None:
        self.ids, self._nats, self._given, self._tokenizer = list(ids), nats, given, tokenizer

    @cached_property
    def text(self) -> str:
        """The prompt."""
        if self._given is None and self._tokenizer is not None:
            return self._tokenizer.decode(self.ids)
        return self._given or ""

    @property
    def offsets(self) -> list[int]:
        """Where each token begins in the text; those of one character begin together."""
        if self._tokenizer is None:
            return [0] * len(self.ids)
        if self._given is not None:
            return self._tokenizer.places(self._given)
        found, at, stream = [], 0, self._tokenizer.stream()
        for token in self.ids:
            found.append(at)
            at += len(stream.push(token))
        return found

    def logprobs(self, named: Callable[[int], str], answer: dict[str, Any]) -> dict[str, Any]:
        """What is told of the tokens of the prompt, and then of the answer's, as the API of completions has it.

        named: how a token is written.
        """
        name = cache(named)
        own: dict[str, list[Any]] = {
            "tokens": [name(token) for token in self.ids],
            "token_logprobs": [None, *(nats for (_, nats), *_ in self._nats)],
            "top_logprobs": [
                None,
                *({name(token): nats for token, nats in (*best, one)} for one, *best in self._nats),
            ],
            "text_offset": self.offsets,
        }
        moved = {"text_offset": [len(self.text) + at for at in answer["text_offset"]]}
        return {key: own[key] + (answer | moved)[key] for key in own}


def echoed(wanted: Wanted, job: Job, tokenizer: TextTokenizer | None) -> list[Echo]:
    """One a prompt; none where they are not asked for."""
    if not wanted.echo:
        return []
    begun = zip(wanted.prompts, job.turns[:: wanted.n], job.posts[:: wanted.n], strict=True)
    return [
        Echo(turn.plan.ids.tolist(), post.scores, prompt if isinstance(prompt, str) else None, tokenizer)
        for prompt, turn, post in begun
    ]
