"""The fields of requests: one table, which checks them and which /openapi.json shows."""

from __future__ import annotations

import math
from dataclasses import Field, fields
from numbers import Integral, Real
from typing import Any

from ..runtime.options import ALONE, Generation
from .failures import Refused

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS, MOST_BIAS, MOST_TOOLS = 16, 64, 20, 100.0, 128
Shape = dict[str, Any]
TEXT: Shape = {"type": "string"}
YES_OR_NO: Shape = {"type": "boolean"}
OBJECT: Shape = {"type": "object"}


BIAS: Shape = {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS}


def whole(low: int, high: int) -> Shape:
    """A whole number of a range."""
    return {"type": "integer", "minimum": low, "maximum": high}


#: Name -> JSON Schema of what is taken. `null` is as good as nothing.
STREAM_OPTIONS: dict[str, Shape] = {"include_usage": YES_OR_NO, "continuous_usage_stats": YES_OR_NO}
COMMON: dict[str, Shape] = {
    "model": TEXT,
    "n": whole(1, MOST_CHOICES),
    "stream": YES_OR_NO,
    "stream_options": OBJECT | {"properties": STREAM_OPTIONS},
    "logit_bias": OBJECT | {"additionalProperties": BIAS},
    "response_format": OBJECT | {"properties": {"type": TEXT, "json_schema": OBJECT}},
    "priority": whole(-100, 100),
    "cache_salt": TEXT,
    "previous_response_id": TEXT,
    "state": TEXT,
    "store": YES_OR_NO,
    "return_state": YES_OR_NO,
}
COMPLETION = COMMON | {
    "prompt": {"type": ["string", "array"]},
    "logprobs": whole(0, MOST_LOGPROBS),
    "echo": YES_OR_NO,
}
CHAT = COMMON | {
    "messages": {"type": "array", "items": OBJECT | {"properties": {"role": TEXT}, "required": ["role"]}},
    "logprobs": YES_OR_NO,
    "top_logprobs": whole(0, MOST_LOGPROBS),
    "tools": {"type": "array", "items": OBJECT},
    "tool_choice": {"type": ["string", "object"]},
    "parallel_tool_calls": YES_OR_NO,
    "add_generation_prompt": YES_OR_NO,
    "continue_final_message": YES_OR_NO,
    "chat_template_kwargs": OBJECT,
}
TOKENIZE: dict[str, Shape] = {"model": TEXT, "prompt": TEXT}
#: Options of a generation that a request has.
OPTIONS = [one for one in fields(Generation) if one.name not in ALONE]
#: Fields that are options of a generation -> their names there.
ALIASES = {"max_completion_tokens": "max_tokens", "stop_token_ids": "stop_tokens"}
GENERATION = {one.name: one.name for one in OPTIONS} | ALIASES
#: Seeds that are taken: OpenAI's have a sign.
LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1

#: Types of JSON Schema -> of Python, and what a message calls them.
TYPES: dict[str, tuple[Any, str]] = {
    "string": (str, "text"),
    "array": (list, "a list"),
    "object": (dict, "an object"),
    "boolean": (bool, "true or false"),
    "integer": (int, "a whole number"),
}
NUMBERS = {Real: "number", Integral: "integer", str: "string", bool: "boolean"}


class Fields:
    """A body, or an object in it, by a table: each field is of its shape when it is read."""

    def __init__(self, body: dict[str, Any], table: dict[str, Shape]) -> None:
        self._body, self._table = body, table

    def __call__(self, name: str, *, needed: bool = False) -> Any:
        """A field; None where it is missing or null. Refused: it is of another shape, or needed and not there."""
        value, shape = self._body.get(name), self._table[name]
        if value is None and not needed:
            return None
        kinds = [shape["type"]] if isinstance(shape["type"], str) else shape["type"]
        good = any(type(value) is TYPES[kind][0] for kind in kinds)
        if good and "minimum" in shape:
            good = shape["minimum"] <= value <= shape["maximum"]
        if not good:
            told = "missing" if name not in self._body else named(value)
            bounds = f" from {shape['minimum']} to {shape['maximum']}" if "minimum" in shape else ""
            expected = " or ".join(TYPES[kind][1] for kind in kinds)
            raise Refused(f"{name} is {told}, expected {expected}{bounds}", param=name)
        return value


def named(value: Any) -> str:
    """What a JSON value is."""
    if value is None:
        return "null"
    found = next((name for kind, name in TYPES.values() if type(value) is kind), "a number")
    return f"{value}"[:30] if type(value) is int else found


def options() -> dict[str, Shape]:
    """The options of a generation, as the table above."""
    own = {one.name: _option(one) for one in OPTIONS}
    own["seed"]["minimum"] = LEAST_SEED
    return own | {alias: own[name] for alias, name in GENERATION.items()}


def _option(one: Field[Any]) -> Shape:
    facts = one.metadata
    shape: Shape = {"type": NUMBERS[facts["kind"]]}
    bounds = {"minimum": facts["low"], "maximum": facts["high"]} if facts["kind"] in (Real, Integral) else {}
    shape |= {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    several = {"type": "array", "items": shape}
    if one.default == ():
        shape = {"anyOf": [shape, several | {"maxItems": MOST_STOPS}]} if facts["kind"] is str else several
    return shape | {"description": facts["help"]}
