"""What clients are told of a model: its name, its sizes, and the options that it takes."""

from __future__ import annotations

import math
from dataclasses import Field, fields
from numbers import Integral, Real
from typing import Any

from ..runtime.options import Generation
from .hosted import Hosted
from .wanted import DEFAULTS


def about(hosted: Hosted) -> dict[str, Any]:
    """An entry of `/v1/models`; under `dijiang` what OpenAI's API does not know."""
    size, named = hosted.sizes, ("state_bytes", "cache_bytes_per_token", "cache_larger_from")
    ours: dict[str, Any] = {name: getattr(size, name) for name in named}
    ours |= {"text": hosted.model.has_tokenizer, "chat": hosted.chats, "options": _options(hosted)}
    return {"id": hosted.name, "object": "model", "created": hosted.created, "owned_by": "dijiang", "dijiang": ours}


def _options(hosted: Hosted) -> list[dict[str, Any]]:
    """Options of a generation that are numbers, with the values that this model has where nothing is said."""
    most, chosen = hosted.settings.max_tokens, DEFAULTS | hosted.sampling
    numbers = [one for one in fields(Generation) if one.metadata["kind"] in (Integral, Real) and one.default != ()]
    found = [_option(one, chosen.get(one.name, one.default)) for one in numbers]
    limit = next(one for one in found if one["name"] == "max_tokens")
    limit |= {"high": most, "default": min(most, limit["default"])}
    return found


def _option(one: Field[Any], default: Any) -> dict[str, Any]:
    facts = one.metadata
    bounds = {name: facts[name] if math.isfinite(facts[name]) else None for name in ("low", "high")}
    whole = facts["kind"] is Integral
    return {"name": one.name, "help": facts["help"], "default": default, "whole": whole} | bounds
