"""Text and token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import BundleError, InputError
from ..models.tokenizer import open_tokenizer, patiently, reported

#: What stands for bytes that are no character, or not one yet.
REPLACEMENT = "\ufffd"
#: Texts before a continuation, tried in turn: what a tokenizer puts at the start of any text lands there.
ANCHORS = ("\n", ".", "a")


def byte_letters() -> dict[str, int]:
    """How tokenizers on bytes write them: those that can be seen as they are, the others from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(unseen)}


def require_unicode(text: str, what: str) -> None:
    """InputError for a lone surrogate, which also stands for a byte that was no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of {what}, {text[error.start]!r}, is no Unicode; give text in UTF-8"
        ) from None


class TextTokenizer:
    """tokenizer.json by Hugging Face tokenizers; `data`: its bytes, as they were checked."""

    def __init__(self, data: bytes, path: Path | None) -> None:
        self._tokenizer = open_tokenizer(data, path, BundleError)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, what in added.items() if what.special)
        self._added = {token: what.content for token, what in added.items()}
        decoder = self._tokenizer.decoder
        state = b"" if decoder is None else decoder.__getstate__()
        self._letters = byte_letters() if b"ByteLevel" in state else {}
        names = [f"<0x{byte:02X}>" for byte in range(256)] if b"ByteFallback" in state else []
        found = [self._tokenizer.token_to_id(name) for name in names]
        #: Tokens of one byte each that LLaMA's decoder reads with all the bytes beside them, or as no character.
        self.bytes = {token: byte for byte, token in enumerate(found) if token is not None}

    @classmethod
    def read(cls, path: Path) -> TextTokenizer:
        """From a file; BundleError if it is not a tokenizer."""
        return cls(path.read_bytes(), path)

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Token ids of all of the text.

        start: the text starts a sequence, so that it gets what the tokenizer itself puts there: <s> in
            LLaMA's, </s> in OPT's, nothing in Pythia's. A text that goes on from another gets nothing,
            not even the space that some tokenizers put before any text.
        """
        if start:
            return self._ids(text, special=True)
        for anchor in ANCHORS:
            before, both = self._ids(anchor), self._ids(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._ids(text)

    def places(self, text: str) -> list[int]:
        """Where each token of a text begins in it; what the tokenizer puts before it begins with it."""
        return [first for first, _ in self._encoding(text, special=True).offsets]

    def after(self, token: int, text: str) -> list[int]:
        """Token ids of a text that stands after a token which is never part of others, as in the whole text.

        Some tokenizers put a space at the start of each part between such tokens.
        """
        ids = self._ids(self.name(token) + text)
        return ids[1:] if ids[:1] == [token] else self.encode(text, start=False)

    def special_ids(self, texts: Sequence[str]) -> list[int]:
        """Ids of those special tokens that are one of the texts."""
        return sorted(token for token in self.special if self._added[token] in texts)

    def as_it_stands(self, text: str) -> list[int]:
        """Token ids of a text that holds its special tokens itself, as chat templates write them."""
        return self._ids(text)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self._encoding(text, special=special).ids
        return ids

    def _encoding(self, text: str, *, special: bool) -> Any:
        """What tokenizers makes of a text."""

        def unread(reason: object) -> InputError:
            return InputError(f"the tokenizer cannot read the text ({reason}); give a tokenizer that reads it")

        require_unicode(text, "the text")

        def encode() -> Any:  # a batch does not hold the interpreter's lock
            return self._tokenizer.encode_batch([text], add_special_tokens=special)[0]

        with reported(unread):
            return patiently(encode, len(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        with reported(lambda e: InputError(f"the tokenizer cannot decode token ids ({e}); use another tokenizer")):
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def name(self, token: int) -> str:
        """How the tokenizer writes one token; empty for an id that it does not know."""
        return self._tokenizer.id_to_token(token) or ""

    def piece(self, token: int) -> bytes:
        """The bytes that one token adds to a text, which need not be whole characters; a special one its name."""
        if token in self._added:
            return self._added[token].encode()
        name = self.name(token)
        if self._letters:
            return bytes(self._letters[letter] for letter in name if letter in self._letters)
        if token in self.bytes:
            return bytes([self.bytes[token]])
        ids, text = self._before
        return self.decode([*ids, token]).removeprefix(text).encode()

    @cached_property
    def _before(self) -> tuple[list[int], str]:
        """What a token is read after: at the start of a text it would lose its space. Ids, and their text."""
        ids = self._ids(ANCHORS[-1])
        return ids, self.decode(ids)

    @cached_property
    def vocabulary(self) -> str:
        """Names what each id means: a hash, which says nothing of how texts are split."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        names = "\0".join(f"{ids[name]} {name}" for name in sorted(ids))
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def stream(self, context: Sequence[int] = (), open: int | None = None) -> TextStream:
        """A decoder for what follows `context`; see TextStream."""
        return TextStream(self, context, open)


class TextStream:
    """Text of a growing sequence, whole characters only.

    It is a function of the last tokens alone, so that it can be taken up anywhere.

    Args:
        context: tokens before; the last of them decide how the next reads.
        open: how many of them belong to a character that is not whole, and were not given out. None:
            as the text shows.
    """

    #: Tokens before a new one that decide how it reads: its leading space, a character of bytes.
    CONTEXT = 16
    #: Tokens that may wait for the end of a character: a model can go on writing bytes that are none. A state
    #: keeps the last 64 ids: these and the context.
    WAITING = 48

    def __init__(self, tokenizer: TextTokenizer, context: Sequence[int] = (), open: int | None = None) -> None:
        self._tokenizer = tokenizer
        known = [int(token) for token in context if token not in tokenizer.special]
        count = self._open_in(known) if open is None else open
        self._open = known[len(known) - count :]
        self._known = known[: len(known) - count][-self.CONTEXT :]
        self._base = tokenizer.decode(self._known)

    @property
    def open(self) -> int:
        """Tokens that wait for the end of a character."""
        return len(self._open)

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        if token in self._tokenizer.special:
            return ""
        self._open.append(token)
        text = self._following()
        waits = token in self._tokenizer.bytes or text.endswith(REPLACEMENT)
        if waits and len(self._open) < self.WAITING:
            return ""
        self._close()
        return text

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        text = self._following()
        self._close()
        return text

    def _following(self) -> str:
        """Text of the open tokens."""
        whole = self._tokenizer.decode(self._known + self._open)
        if whole.startswith(self._base):
            return whole[len(self._base) :]
        # A byte that fits no character takes back those before it. Of a prompt, or of more than WAITING bytes,
        # they have been given out, so the open ones are read alone.
        return self._tokenizer.decode(self._open)

    def _close(self) -> None:
        self._known = (self._known + self._open)[-self.CONTEXT :]
        self._open = []
        self._base = self._tokenizer.decode(self._known)

    def _open_in(self, known: list[int]) -> int:
        """Tokens at the end whose character is not whole."""
        for count in range(min(len(known), self.WAITING)):
            before = known[: len(known) - count][-self.CONTEXT :]
            if not self._tokenizer.decode(before).endswith(REPLACEMENT):
                return count
        return 0


class StopStrings:
    """Holds text back while its end may be the start of a stop string.

    held: text that was held back before.
    """

    def __init__(self, stops: Sequence[str], held: str = "") -> None:
        if "" in stops:
            raise InputError("a stop string is empty, expected some text; leave it out")
        for stop in stops:
            require_unicode(stop, f"the stop string {stop!r}")
        self._stops = tuple(stops)
        self.held = held

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to give out, whether a stop string was met); the stop string is cut."""
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            text, self.held = self.held[: min(found)], ""
            return text, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        at = len(self.held) - keep
        text, self.held = self.held[:at], self.held[at:]
        return text, False

    def flush(self) -> str:
        """The text held back, once no more will come."""
        text, self.held = self.held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that starts `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
