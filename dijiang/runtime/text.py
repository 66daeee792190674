"""Text and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import BundleError, InputError


class TextTokenizer:
    """tokenizer.json by Hugging Face tokenizers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path}: not a tokenizer ({error}); export the bundle again") from error

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens; InputError for an empty prompt."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise InputError("the prompt is empty, expected at least one token; give some text")
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

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._open: list[int] = []  # tokens of a character that is not whole yet
        for token in prompt[-self.CONTEXT :]:
            self.push(token)
        self._open = []

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        text: str | None = self._stream.step(self._tokenizer._tokenizer, token)
        self._open = [] if text is not None else [*self._open, token]
        return text or ""

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        left, self._open = self._open, []
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
