"""A prompt as the beginning of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runtime.text import TextTokenizer
from .relay import Job, Nats
from .wanted import Wanted


class Echo:
    """What an answer of `/v1/completions` repeats.

    Args:
        ids: of the prompt, as they were fed.
        nats: of each of them but the first, which follows nothing; empty: not asked for. They come while it is fed.
        given: the prompt, where it was text.
        tokenizer: None: there is none, and ids stay ids.
    """

    def __init__(
        self, ids: Sequence[int], nats: Sequence[Nats], given: str | None, tokenizer: TextTokenizer | None
    ) -> None:
        self.ids, self.nats = list(ids), nats
        #: Where each token begins in the text; those of one character begin together.
        self.offsets: list[int] = []
        decoded = ""
        if tokenizer is not None:
            stream, pieces, at = tokenizer.stream(), [], 0
            for token in self.ids:
                self.offsets.append(at)
                pieces.append(stream.push(token))
                at += len(pieces[-1])
            decoded = "".join([*pieces, stream.flush()])
        self.text = decoded if given is None else given

    def joined(self, own: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of the prompt and of the answer, each in the shape of the API of completions."""
        moved = {"text_offset": [len(self.text) + at for at in answer["text_offset"]]}
        placed = {"text_offset": self.offsets or [0] * len(self.ids)}
        return {name: (own | placed)[name] + (answer | moved)[name] for name in answer}


def echoed(wanted: Wanted, job: Job, tokenizer: TextTokenizer | None) -> list[Echo]:
    """One a prompt; none where they are not asked for."""
    if not wanted.echo:
        return []
    begun = zip(wanted.prompts, job.turns[:: wanted.n], job.posts[:: wanted.n], strict=True)
    return [
        Echo(turn.plan.ids.tolist(), post.scores, prompt if isinstance(prompt, str) else None, tokenizer)
        for prompt, turn, post in begun
    ]
