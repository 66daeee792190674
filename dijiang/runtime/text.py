"""Text and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BundleError, InputError

if TYPE_CHECKING:
    from tokenizers.decoders import DecodeStream


class TextTokenizer:
    """tokenizer.json by Hugging Face tokenizers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path}: not a tokenizer ({error}); export the bundle again") from error
        # A file may hold what its training cut and padded texts to.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, what in added.items() if what.special)

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Token ids of all of the text.

        start: the text starts a sequence, so that it gets what the tokenizer itself puts there: <s> in
            LLaMA's, </s> in OPT's, nothing in Pythia's.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=start).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A decoder for the continuation of a prompt."""
        return TextStream(self, prompt)


class TextStream:
    """Text of a growing sequence, whole UTF-8 characters only."""

    #: Prompt tokens that decide how the first new one reads: its leading space, an open character.
    CONTEXT = 16
    #: Tokens that may wait for the end of a character: a model can go on writing bytes that are none.
    WAITING = 32

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = self._new_stream()
        self._open: list[int] = []  # tokens of a character that is not whole yet
        for token in prompt[-self.CONTEXT :]:
            self.push(token)
        self._open = []

    @staticmethod
    def _new_stream() -> DecodeStream:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        if token in self._tokenizer.special:
            return ""
        self._open.append(token)
        try:
            text = self._step(token)
        except Exception:  # tokenizers raises bare Exception
            # LLaMA's decoder reads consecutive bytes as one: a byte that fits no character takes back
            # those before it. They have been given out, so reading starts again after them.
            self._stream = self._new_stream()
            text = "".join(self._step(left) or "" for left in self._open)
        if text:
            self._open = []
        elif len(self._open) == self.WAITING:
            text = self.flush()
        return text or ""

    def _step(self, token: int) -> str | None:
        text: str | None = self._stream.step(self._tokenizer._tokenizer, token)
        return text

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        left, self._open, self._stream = self._open, [], self._new_stream()
        return self._tokenizer.decode(left)


class StopStrings:
    """Holds text back while its end may be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InputError("a stop string is empty, expected some text; leave it out")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to give out, whether a stop string was met); the stop string is cut."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        at = len(self._held) - keep
        text, self._held = self._held[:at], self._held[at:]
        return text, False

    def flush(self) -> str:
        """The text held back, once no more will come."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that starts `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
