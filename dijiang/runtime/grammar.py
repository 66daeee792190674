"""What a text may look like, token by token, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Collection
from math import isqrt
from typing import Any

import numpy as np

from ..errors import InputError

#: Between tokens of JSON there is no white space: a model could go on writing it for ever.
COMPACT: Any = {"whitespace_flexible": False}
#: Compiling takes time by the square of how many properties, or forms, stand side by side: at most the sum of these
#: squares. It is 2,000 properties of one object, which take a third of a second.
MOST_WORK = 4_000_000
#: Characters of a schema's JSON. The first token of one long word takes a second for each million.
MOST_TEXT = 100_000
#: Values of `format` that llguidance knows. JSON Schema lets the others say something to people only.
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
#: Keys of a schema whose values are no schemas; and whose values are schemas by names that anybody may choose.
VALUES = ("const", "enum", "default", "examples")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
FOR_PEOPLE = ("title", "description", "$comment")
#: Schemas in schemas.
DEEPEST = 100


class GrammarTokenizer:
    """A tokenizer as grammars see it.

    Args:
        data: tokenizer.json.
        vocab_size: of the model.
        ends: the model's end tokens, which close a text.
    """

    def __init__(self, data: bytes, vocab_size: int, ends: Collection[int]) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise InputError("a grammar needs llguidance; pip install 'dijiang[serve]'") from None
        if not ends:
            raise InputError("a grammar needs an end token, and this model has none; ask for plain text")
        try:
            self.inner = LLTokenizer(data.decode(), n_vocab=vocab_size, eos_token=sorted(ends))
        except ValueError as error:
            raise InputError(f"the tokenizer does not go with grammars ({error}); ask for plain text") from error
        self.vocab_size = vocab_size


class Grammar:
    """What a text may look like, compiled.

    form: a JSON schema, or a grammar in llguidance's dialect of Lark.

    Raises:
        InputError: it is none, or too complex.
    """

    def __init__(self, tokenizer: GrammarTokenizer, form: dict[str, Any] | str) -> None:
        from llguidance import LLMatcher

        self._tokenizer = tokenizer
        try:
            if isinstance(form, str):
                grammar = LLMatcher.grammar_from_lark(form)
            else:
                json.dumps(form)  # it does not hold itself
                schema = without_remarks(form)
                require_small(schema)  # what JSON cannot say is a ValueError
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT)
        except ValueError as error:
            raise InputError(f"the schema does not compile ({_line(error)}); change it") from error
        self._matcher = LLMatcher(tokenizer.inner, grammar, log_level=0)
        if self._matcher.is_error():
            raise InputError(f"the schema does not compile ({_line(self._matcher.get_error())}); change it")

    def begin(self) -> Matcher:
        """The start of a text."""
        return Matcher(self._matcher.deep_copy(), self._tokenizer.vocab_size)


def require_small(*forms: Any) -> None:
    """InputError for JSON schemas that together take too long to compile or to match."""
    text = sum(len(json.dumps(form, ensure_ascii=False)) for form in forms)
    if text > MOST_TEXT:
        raise InputError(
            f"the schema, with those of tools, has {text:,} characters, expected at most {MOST_TEXT:,}; "
            "use a simpler one"
        )
    work, left = 0, list(forms)
    while left:
        each = left.pop()
        inner = list(each.values()) if isinstance(each, dict) else each if isinstance(each, list) else []
        nested = [one for one in inner if isinstance(one, (dict, list))]
        work += len(nested) ** 2
        left += nested
    if work > MOST_WORK:
        raise InputError(
            "the schema has too many properties or forms side by side, expected at most "
            f"{isqrt(MOST_WORK):,} in one place; use a simpler one"
        )


def without_remarks(schema: Any, depth: int = 0) -> Any:
    """A JSON schema without what allows every text: what is for people, formats that nobody checks, and
    `uniqueItems` of false.

    Raises:
        InputError: it is nested too deeply.
    """
    if depth > DEEPEST:
        raise InputError(f"the schema has more than {DEEPEST} schemas in one another; use a simpler one")
    if isinstance(schema, list):
        return [without_remarks(each, depth + 1) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for name, value in schema.items():
        if name == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if (name == "uniqueItems" and value is False) or (name in FOR_PEOPLE and isinstance(value, str)):
            continue
        if name in NAMED and isinstance(value, dict):
            found[name] = {key: without_remarks(each, depth + 1) for key, each in value.items()}
        else:
            found[name] = value if name in VALUES else without_remarks(value, depth + 1)
    return found


class Matcher:
    """A place in a text of a grammar."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        self._inner, self._vocab = inner, vocab_size

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, [vocab] bool; InputError if the grammar became too complex."""
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        if self._inner.is_error():
            raise InputError(f"the grammar cannot go on ({_line(self._inner.get_error())}); use a simpler schema")
        return np.unpackbits(bits, bitorder="little", count=self._vocab).astype(bool)

    def take(self, token: int) -> None:
        """Go on by a token that is allowed."""
        self._inner.consume_token(token)


def _line(error: object) -> str:
    """The start of a message, in one line."""
    return " ".join(str(error).split())[:200]
