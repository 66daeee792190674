"""A request of OpenAI's API, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..runtime.options import Generation
from .failures import Refused
from .fields import (
    CHAT,
    COMPLETION,
    GENERATION,
    LEAST_SEED,
    MOST_BIAS,
    MOST_CHOICES,
    MOST_SEED,
    MOST_STOPS,
    STREAM_OPTIONS,
    Fields,
    named,
)
from .settings import Serving
from .tools import Offer, offer, past_calls
from .unserved import UNSERVED, UNSERVED_IN_CHATS, UNSERVED_IN_MESSAGE, refuse_unserved

#: What OpenAI's API takes where nothing is said.
DEFAULTS = {"temperature": 1.0}
#: Tokens of an answer where nothing is said: of a completion; a chat's end with its turn, or the server's limit.
COMPLETION_TOKENS = 16
#: Keys of parts of a message that are text.
TEXTS = ("text", "refusal")
#: What a chat's template is given in any case.
OF_TEMPLATES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class Wanted:
    """What a request asks for.

    prompts: texts or ids, one or more; or `messages` of a chat.  answer: the template writes how an answer begins.
    goes_on: the last message is not at its end, and the answer continues it.  variables: of the template, by name.
    usage, usage_each: tell what it took, at the end; with each piece of a stream, too.
    logprobs: most likely tokens to name beside each; None: no log-probabilities.
    echo: the answer begins with the prompt.  silent: and ends with it.
    previous: id of the answer that is continued.  sealed: state that is continued.
    schema: of JSON that the text has to be, where no tool is called.  offer: tools that may be called.
    store, seal: keep the state, or give it back, at the end.
    """

    model: str
    options: Generation
    prompts: tuple[str | list[int], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    answer: bool = True
    goes_on: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    stream: bool = False
    usage: bool = False
    usage_each: bool = False
    logprobs: int | None = None
    echo: bool = False
    silent: bool = False
    bias: tuple[tuple[int, float], ...] = ()
    schema: dict[str, Any] | None = None
    offer: Offer | None = None
    priority: int = 0
    salt: str = ""
    previous: str | None = None
    sealed: str | None = None
    store: bool = False
    seal: bool = False

    @property
    def asked(self) -> str:
        """The field that says what is asked."""
        return "messages" if self.messages else "prompt"

    @property
    def scores(self) -> bool:
        """Whether the answer has the log-probabilities of the prompt."""
        return self.echo and self.logprobs is not None

    @property
    def choices(self) -> int:
        """Generations that it takes."""
        return self.n * max(1, len(self.prompts))


def _priority(asked: int, settings: Serving) -> int:
    """Refused where one client could go before the others."""
    if asked and not settings.priorities:
        raise Refused(
            "priorities are not served here; leave priority out, or start serve --priorities", param="priority"
        )
    return asked


def read(body: Any, settings: Serving, sampling: dict[str, Any], *, chat: bool) -> Wanted:
    """Check a body of `/v1/completions`, or `/v1/chat/completions`.

    sampling: defaults of the model.

    Raises:
        Refused: a field is missing, of the wrong type, out of range or not served. Unknown ones are ignored.
    """
    if not isinstance(body, dict):
        raise Refused(f"the body is {named(body)}, expected an object")
    refuse_unserved(body, UNSERVED | (UNSERVED_IN_CHATS if chat else {}) | _alike(body, chat))
    given = Fields(body, CHAT if chat else COMPLETION)
    chosen = _chat(given) if chat else {"prompts": _prompts(given("prompt", needed=True))}
    previous, sealed = given("previous_response_id"), given("state")
    if previous is not None and sealed is not None:
        raise Refused("both previous_response_id and state are given; give one", param="state")
    echo = not chat and bool(given("echo"))
    alone = body.get("max_completion_tokens") is None
    silent = echo and alone and type(body.get("max_tokens")) is int and body["max_tokens"] == 0
    if silent:  # the token that is made all the same is not told
        body = body | {"max_tokens": 1}
    stream, stream_options = bool(given("stream")), Fields(given("stream_options") or {}, STREAM_OPTIONS)
    wanted = Wanted(
        model=given("model", needed=True),
        options=_options(body, settings, sampling, chat=chat),
        n=given("n") or 1,
        stream=stream,
        usage=not stream or bool(stream_options("include_usage")),
        usage_each=bool(stream_options("continuous_usage_stats")),
        logprobs=_top_logprobs(given) if chat else given("logprobs"),
        echo=echo,
        silent=silent,
        bias=_bias(given("logit_bias") or {}),
        schema=_schema(given("response_format") or {"type": "text"}),
        priority=_priority(given("priority") or 0, settings),
        salt=given("cache_salt") or "",
        previous=previous,
        sealed=sealed,
        store=bool(given("store")),
        seal=bool(given("return_state")),
        **chosen,
    )
    if wanted.choices > MOST_CHOICES:
        raise Refused(f"{wanted.choices} choices, expected at most {MOST_CHOICES}; send more requests", param="n")
    if wanted.goes_on and (wanted.schema or wanted.offer or previous is not None or sealed is not None):
        raise Refused(
            "continue_final_message goes on within a message, and not with response_format, tools or a kept state; "
            "leave it out",
            param="continue_final_message",
        )
    if echo and (stream or wanted.store or wanted.seal or previous is not None or sealed is not None):
        raise Refused(
            "echo is of a whole prompt, in one piece; leave out stream and what keeps states", param="echo"
        )
    if wanted.choices > 1 and (wanted.store or wanted.seal or previous is not None or sealed is not None):
        raise Refused("a state is kept or continued by one choice alone; set n to 1 and give one prompt", param="n")
    return wanted


def _alike(body: dict[str, Any], chat: bool) -> dict[str, tuple[Any, ...]]:
    """Values that change nothing beside what else a body says; see UNSERVED."""
    found = {"best_of": (*UNSERVED["best_of"], body.get("n")), "add_special_tokens": (None, not chat)}
    if body.get("ignore_eos") is True and not any(
        body.get(name) for name in ("stop", "stop_tokens", "stop_token_ids")
    ):
        found["min_tokens"] = (body.get("min_tokens"),)  # it ends at max_tokens only
    return found


def _options(body: dict[str, Any], settings: Serving, sampling: dict[str, Any], *, chat: bool) -> Generation:
    names = {ours: name for name, ours in GENERATION.items() if body.get(name) is not None}
    given = {ours: body[name] for ours, name in names.items()}
    stop = given.get("stop", ())
    if isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise Refused(f"{len(stop)} stop strings, expected at most {MOST_STOPS}", param="stop")
    if "" in ([stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []):
        raise Refused("a stop string is empty, expected some text", param="stop")
    for ours, low, high in (("max_tokens", 1, settings.max_tokens), ("seed", LEAST_SEED, MOST_SEED)):
        value = given.get(ours)
        if type(value) is int and not low <= value <= high:
            name = names[ours]
            raise Refused(f"{name} is {value}, expected a whole number from {low} to {high}", param=name)
    if type(given.get("seed")) is int:
        given["seed"] %= 2**64
    given.setdefault("max_tokens", settings.max_tokens if chat else COMPLETION_TOKENS)
    try:
        options = Generation.of(DEFAULTS | sampling | given)
    except InputError as error:
        ours, _, rest = str(error).partition(" ")
        raise Refused(f"{names.get(ours, ours)} {rest}", param=names.get(ours)) from None
    return options.seeded()


def _chat(given: Fields) -> dict[str, Any]:
    messages = given("messages", needed=True)
    if not messages:
        raise Refused("messages is empty, expected at least one", param="messages")
    goes_on, begins = bool(given("continue_final_message")), given("add_generation_prompt")
    if goes_on and begins:
        raise Refused(
            "both continue_final_message and add_generation_prompt are true; give one",
            param="add_generation_prompt",
        )
    variables = given("chat_template_kwargs") or {}
    if taken := [name for name in OF_TEMPLATES if name in variables]:
        raise Refused(
            f"chat_template_kwargs has {taken[0]}, which is a field of its own", param="chat_template_kwargs"
        )
    return {
        "messages": tuple(_message(message, at) for at, message in enumerate(messages)),
        "offer": offer(given),
        "answer": begins is not False and not goes_on,
        "goes_on": goes_on,
        "variables": variables,
    }


def _message(message: Any, at: int) -> dict[str, Any]:
    """Role, text and calls of tools."""
    where = f"messages[{at}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(f"{where} is {named(message)}, expected an object with a role", param=where)
    refuse_unserved(message, UNSERVED_IN_MESSAGE, where)
    beside = {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
    if message.get("tool_calls"):
        beside["tool_calls"] = past_calls(message["tool_calls"], where)
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        content = message.get("refusal")
        if content is None and ("tool_calls" in beside or "content" in message):
            content = ""  # it said nothing
    return {"role": message["role"], "content": _text(content, where)} | beside


def _text(content: Any, where: str) -> str:
    """The content of a message. Parts are joined: each is text, or why an answer has none."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"{where}.content is no text, expected text", param=where)
    texts = []
    for at, part in enumerate(content):
        text = next((part[kind] for kind in TEXTS if kind in part), None) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise Refused(f"{where}.content[{at}] is no text, expected text", param=where)
        texts.append(text)
    return "".join(texts)


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


def _top_logprobs(given: Fields) -> int | None:
    """How many most likely tokens a chat wants named; None: no log-probabilities at all."""
    top: int = given("top_logprobs") or 0
    if top and not given("logprobs"):
        raise Refused("top_logprobs needs logprobs to be true", param="top_logprobs")
    return top if given("logprobs") else None


def _schema(form: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that a response_format asks for; None: any text."""
    kind, named = form.get("type"), form.get("json_schema")
    if kind == "json_object":  # llama.cpp's has the schema beside the type
        named = form
    if kind in ("json_schema", "json_object") and isinstance(named, dict) and isinstance(named.get("schema"), dict):
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
        if not number or not -MOST_BIAS <= amount <= MOST_BIAS:  # NaN is none, and 10^400 no float
            raise Refused(f"logit_bias of token {token} is no number from -100 to 100", param="logit_bias")
        found.append((int(token), float(amount)))
    return tuple(found)
