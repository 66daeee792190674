"""Reading config.json: one line for every wrong key."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError


def want(config: dict[str, Any], key: str, kind: type) -> Any:
    """The value of `key`, or an error that names the key and the type expected."""
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected {kind.__name__}; fix config.json")
    return value


def flag(config: dict[str, Any], key: str, *, default: bool) -> bool:
    """A truth value, `default` where `key` is absent."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected true or false; fix config.json")
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as it comes: absent, one id, or a list."""
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise CheckpointError(f"config.json: eos_token_id is {value!r}, expected token ids; fix config.json")
    return tuple(found)
