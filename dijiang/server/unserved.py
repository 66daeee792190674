"""Fields that would change an answer and are not served: they are refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .failures import Refused

#: Field -> values that change nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    # OpenAI's.
    "suffix": (None, ""),
    "best_of": (None, 1),
    "functions": (None, []),
    "function_call": (None, "auto", "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    # vLLM's.
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "documents": (None, []),
    "include_stop_str_in_output": (None, False),
    "min_tokens": (None, 0),
    "prompt_logprobs": (None,),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    # SGLang's.
    "ebnf": (None, ""),
    "no_stop_trim": (None, False),
    "regex": (None, ""),
    "stop_regex": (None, "", []),
    # llama.cpp's.
    "dry_multiplier": (None, 0),
    "dynatemp_range": (None, 0),
    "grammar": (None, ""),
    "json_schema": (None,),
    "mirostat": (None, 0),
    "repeat_penalty": (None, 1),
    "typical_p": (None, 1),
    "xtc_probability": (None, 0),
}
#: The same of chats alone.
UNSERVED_IN_CHATS: dict[str, tuple[Any, ...]] = {"echo": (None, False)}
#: The same of a message.
UNSERVED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {"audio": (None,), "function_call": (None,)}


def refuse_unserved(given: Mapping[str, Any], unserved: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Refused for a field of that table with a value that would change something.

    where: the object is, as `messages[0]`; empty: it is the body.
    """
    for name, same in unserved.items():
        if given.get(name) not in same:
            found = f"{where}.{name}" if where else name
            raise Refused(f"{found} is not served here; leave it out", param=found, code="unsupported_parameter")
