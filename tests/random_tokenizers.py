"""Small tokenizers of every kind that models of these families have, and random sequences of their tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dijiang.runtime.text import TextTokenizer

CORPUS = [
    "def main(arguments): return the other thing, café naïve 漢字 🙂\n",
    "  spaces   and\ttabs",
    "x = [1, 2]",
] * 9
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(*, prefix: bool, size: int = 330) -> Tokenizer:
    """GPT-2, GPT-NeoX and OPT."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_fallback(*, normalizer: bool) -> Tokenizer:
    """LLaMA, with the space before a text by a normalizer (its files until 2024) or by Metaspace."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trained.train_from_iterator(["main return thing"], trainers.BpeTrainer(vocab_size=320, special_tokens=special))
    vocab = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.add_special_tokens(special[:3])
    if normalizer:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return made


def unigram(*, fallback: bool) -> Tokenizer:
    """SentencePiece's other model, with Metaspace."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((f"▁{w}", -4.0) for w in ("the", "main", "return"))]
    pieces += [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz():,é漢"] + [(word, -4.5) for word in ("ing", "tion")]
    pieces += [(byte, -9.0) for byte in BYTES] if fallback else []
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=fallback))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    parts = [decoders.ByteFallback(), decoders.Metaspace()] if fallback else [decoders.Metaspace()]
    made.decoder = decoders.Sequence(parts)
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(prefix=False),
    "byte-level, prefix space": lambda: byte_level(prefix=True),
    "byte fallback, normalizer": lambda: byte_fallback(normalizer=True),
    "byte fallback, Metaspace": lambda: byte_fallback(normalizer=False),
    "Unigram": lambda: unigram(fallback=False),
    "Unigram, byte fallback": lambda: unigram(fallback=True),
}


@cache
def tokenizer(kind: str) -> TextTokenizer:
    """One of KINDS."""
    return TextTokenizer(KINDS[kind]().to_str().encode(), None)


def sequence(kind: str, draw: random.Random) -> list[int]:
    """Tokens of a text, any tokens, or both in turn; 1 to 40 of them."""
    one, found = tokenizer(kind), []
    size = one._tokenizer.get_vocab_size()
    while not found or draw.random() < 0.5:
        if draw.random() < 0.5:
            found += [draw.randrange(size) for _ in range(draw.randrange(1, 12))]
        else:
            text = "".join(draw.choice("abc é漢字🙂 \n�") for _ in range(draw.randrange(8)))
            found += one.encode(text, start=draw.random() < 0.5)
    return found[:40]


def streamed(kind: str, ids: list[int]) -> str:
    """The text of ids, one after another."""
    stream = tokenizer(kind).stream()
    return "".join(stream.push(token) for token in ids) + stream.flush()
