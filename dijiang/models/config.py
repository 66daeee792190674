"""Reading config.json: one line for every wrong key."""

from __future__ import annotations

import math
from typing import Any

from ..errors import CheckpointError

#: Token ids are int64 in the graph; nobody has more tokens than this.
MAX_TOKEN_ID = 2**31


def brief(value: Any) -> str:
    """A value in an error's line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def want(config: dict[str, Any], key: str, kind: type) -> Any:
    """The value of `key`, or an error that names the key and the type expected."""
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {brief(value)}, expected {kind.__name__}; fix config.json")
    return value


def number(config: dict[str, Any], key: str, default: float) -> float:
    """A finite number that is not negative, `default` where `key` is absent."""
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise CheckpointError(f"config.json: {key} is {brief(value)}, expected a finite number; fix config.json")
    return float(value)


def flag(config: dict[str, Any], key: str, *, default: bool) -> bool:
    """A truth value, `default` where `key` is absent."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {brief(value)}, expected true or false; fix config.json")
    return value


def token_ids(config: dict[str, Any], key: str, file: str = "config.json") -> tuple[int, ...]:
    """Token ids as they come: absent, one, or a list. file: for the error."""
    value = config.get(key)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < MAX_TOKEN_ID for one in found):
        raise CheckpointError(f"{file}: {key} is {brief(value)}, expected token ids; fix {file}")
    return tuple(found)


def common_fields(config: dict[str, Any], *, intermediate: str = "intermediate_size") -> dict[str, Any]:
    """Fields of a `ModelSpec` that every family's config has, nearly all under the same names."""
    return {
        "vocab_size": want(config, "vocab_size", int),
        "hidden_size": want(config, "hidden_size", int),
        "intermediate_size": want(config, intermediate, int),
        "num_layers": want(config, "num_hidden_layers", int),
        "num_heads": want(config, "num_attention_heads", int),
        "max_positions": want(config, "max_position_embeddings", int),
        "bos_token_id": _start_token(config),
        "eos_token_ids": token_ids(config, "eos_token_id"),
    }


def _start_token(config: dict[str, Any]) -> int | None:
    """`bos_token_id`, None where it is absent."""
    found = token_ids(config, "bos_token_id")
    if len(found) > 1:
        raise CheckpointError(f"config.json: bos_token_id is {brief(found)}, expected one id; fix config.json")
    return next(iter(found), None)
