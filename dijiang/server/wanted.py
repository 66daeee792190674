"""A request of OpenAI's API, read and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InputError
from ..runtime.options import Generation
from .failures import Refused
from .settings import Serving

#: Fields that are options of a generation, under our names. The others of `Generation` are ours alone.
GENERATION = {one.name: one.name for one in fields(Generation)} | {"max_completion_tokens": "max_tokens"}
#: What OpenAI's API takes where nothing is said.
DEFAULTS = {"temperature": 1.0}
#: Tokens of an answer where nothing is said: of a completion; a chat's end with its turn, or the server's limit.
COMPLETION_TOKENS = 16
#: Fields that would change the answer and cannot be served -> values that change nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
}
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS, MOST_BIAS = 16, 4, 20, 100.0


@dataclass(frozen=True)
class Wanted:
    """What a request asks for.

    prompts: texts or ids, one or more; or `messages` of a chat.
    usage, usage_each: tell what it took, at the end; with each piece of a stream, too.
    logprobs: most likely tokens to name beside each; None: no log-probabilities.
    previous: id of the answer that is continued.  sealed: state that is continued.
    schema: of JSON that the text has to be.
    store, seal: keep the state, or give it back, at the end.
    """

    model: str
    options: Generation
    prompts: tuple[str | list[int], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    n: int = 1
    stream: bool = False
    usage: bool = False
    usage_each: bool = False
    logprobs: int | None = None
    bias: tuple[tuple[int, float], ...] = ()
    schema: dict[str, Any] | None = None
    priority: int = 0
    previous: str | None = None
    sealed: str | None = None
    store: bool = False
    seal: bool = False

    @property
    def choices(self) -> int:
        """Generations that it takes."""
        return self.n * max(1, len(self.prompts))


def read(body: Any, settings: Serving, sampling: dict[str, Any], *, chat: bool) -> Wanted:
    """Check a body of `/v1/completions`, or `/v1/chat/completions`.

    sampling: defaults of the model.

    Raises:
        Refused: a field is missing, of the wrong type, out of range or not served. Unknown ones are ignored.
    """
    if not isinstance(body, dict):
        raise Refused(f"the body is {_name(body)}, expected an object")
    for name, same in UNSERVED.items():
        if body.get(name) not in same:
            raise Refused(f"{name} is not served here; leave it out", param=name, code="unsupported_parameter")
    chosen = _chat(body) if chat else {"prompts": _prompts(_field(body, "prompt", (str, list), needed=True))}
    previous, sealed = _field(body, "previous_response_id", str), _field(body, "state", str)
    if previous is not None and sealed is not None:
        raise Refused("both previous_response_id and state are given; give one", param="state")
    stream = bool(_field(body, "stream", bool))
    stream_options = _field(body, "stream_options", dict) or {}
    wanted = Wanted(
        model=_field(body, "model", str, needed=True),
        options=_options(body, settings, sampling, chat=chat),
        n=_whole(body, "n", 1, MOST_CHOICES) or 1,
        stream=stream,
        usage=not stream or bool(_field(stream_options, "include_usage", bool)),
        usage_each=bool(_field(stream_options, "continuous_usage_stats", bool)),
        logprobs=_logprobs(body, chat=chat),
        bias=_bias(_field(body, "logit_bias", dict) or {}),
        schema=_schema(_field(body, "response_format", dict) or {"type": "text"}),
        priority=_whole(body, "priority", -100, 100) or 0,
        previous=previous,
        sealed=sealed,
        store=bool(_field(body, "store", bool)),
        seal=bool(_field(body, "return_state", bool)),
        **chosen,
    )
    if wanted.choices > MOST_CHOICES:
        raise Refused(f"{wanted.choices} choices, expected at most {MOST_CHOICES}; send more requests", param="n")
    if wanted.choices > 1 and (wanted.store or wanted.seal or previous is not None or sealed is not None):
        raise Refused("a state is kept or continued by one choice alone; set n to 1 and give one prompt", param="n")
    return wanted


def _options(body: dict[str, Any], settings: Serving, sampling: dict[str, Any], *, chat: bool) -> Generation:
    given = {ours: body[name] for name, ours in GENERATION.items() if body.get(name) is not None}
    stop = given.get("stop", ())
    if isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise Refused(f"{len(stop)} stop strings, expected at most {MOST_STOPS}", param="stop")
    if "" in ([stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []):
        raise Refused("a stop string is empty, expected some text", param="stop")
    given.setdefault("max_tokens", settings.max_tokens if chat else COMPLETION_TOKENS)
    try:
        options = Generation.of(DEFAULTS | sampling | given)
    except InputError as error:
        name = str(error).split(" ", 1)[0]
        raise Refused(str(error), param=name if name in GENERATION else None) from None
    if options.max_tokens > settings.max_tokens:
        raise Refused(
            f"max_tokens is {options.max_tokens}, expected at most {settings.max_tokens}; ask for fewer",
            param="max_tokens",
        )
    return options.seeded()


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    messages = _field(body, "messages", list, needed=True)
    if not messages:
        raise Refused("messages is empty, expected at least one", param="messages")
    return {"messages": tuple(_message(message, at) for at, message in enumerate(messages))}


def _message(message: Any, at: int) -> dict[str, str]:
    """Role and text; content in parts is joined, as long as they are text."""
    where = f"messages[{at}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(f"{where} is {_name(message)}, expected an object with a role", param=where)
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise Refused(f"{where}.content is no text, expected text", param=where)
    return {"role": message["role"], "content": content}


def _prompts(prompt: str | list[Any]) -> tuple[str | list[int], ...]:
    """One text, several, ids, or several of ids."""
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and all(map(_is_id, prompt)):
        return (prompt,)
    good = prompt and all(isinstance(p, str) or (isinstance(p, list) and p and all(map(_is_id, p))) for p in prompt)
    if not good:
        raise Refused("prompt is neither text, texts, token ids nor lists of them", param="prompt")
    return tuple(prompt)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _logprobs(body: dict[str, Any], *, chat: bool) -> int | None:
    """How many most likely tokens to name; None: no log-probabilities at all."""
    if not chat:
        return _whole(body, "logprobs", 0, MOST_LOGPROBS)
    top = _whole(body, "top_logprobs", 0, MOST_LOGPROBS)
    if not _field(body, "logprobs", bool):
        if top:
            raise Refused("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    return top or 0


def _schema(form: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that a response_format asks for; None: any text."""
    kind, named = form.get("type"), form.get("json_schema")
    if kind == "json_schema" and isinstance(named, dict) and isinstance(named.get("schema"), dict):
        return dict(named["schema"])
    if kind not in ("text", "json_object"):
        raise Refused(
            "response_format is none of text, json_object and json_schema with a schema; use one of them",
            param="response_format",
        )
    return {"type": "object"} if kind == "json_object" else None


def _bias(given: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    found = []
    for token, amount in given.items():
        number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not token.isascii() or not token.isdecimal() or len(token) > 9:
            raise Refused(f"logit_bias has the token {token[:20]!r}, expected an id", param="logit_bias")
        if not number or not math.isfinite(amount) or abs(amount) > MOST_BIAS:
            raise Refused(f"logit_bias of token {token} is no number from -100 to 100", param="logit_bias")
        found.append((int(token), float(amount)))
    return tuple(found)


def _field(body: dict[str, Any], name: str, kind: Any, *, needed: bool = False) -> Any:
    """A field of the right type; None where it is missing or null."""
    value = body.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, kind):
        told = "missing" if name not in body else _name(value)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise Refused(f"{name} is {told}, expected {' or '.join(map(_NAMES.__getitem__, kinds))}", param=name)
    return value


def _whole(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused(f"{name} is out of range, expected a whole number from {low} to {high}", param=name)
    return value


_NAMES = {str: "text", list: "a list", dict: "an object", bool: "true or false"}


def _name(value: Any) -> str:
    """What a JSON value is."""
    if value is None:
        return "null"
    return next((name for kind, name in _NAMES.items() if isinstance(value, kind)), "a number")
