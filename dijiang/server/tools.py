"""`tools` of a chat: what may be called, what was called before, and what an answer calls."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..reading import parse_json
from ..runtime.calls import Part, Tool
from .failures import Refused
from .fields import MOST_TOOLS, Fields

#: Names that OpenAI's API takes.
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
#: Choices that are words -> whether a tool has to be called.
CHOICES = {"auto": False, "required": True}
NONE = "none"


@dataclass(frozen=True)
class Offer:
    """Tools that an answer may call.

    must: it has to.  several: it may call more than one.
    """

    tools: tuple[Tool, ...]
    must: bool
    several: bool


def offer(given: Fields) -> Offer | None:
    """What `tools`, `tool_choice` and `parallel_tool_calls` say; None: nothing is to be called."""
    found, choice = given("tools") or [], given("tool_choice")
    tools = [_tool(tool, at) for at, tool in enumerate(found)]
    if len(tools) > MOST_TOOLS:
        raise Refused(f"{len(tools)} tools, expected at most {MOST_TOOLS}", param="tools")
    if len({tool.name for tool in tools}) < len(tools):
        raise Refused("two tools have one name, expected a name for each", param="tools")
    chosen = _chosen(choice)
    if chosen is not None:
        tools = [tool for tool in tools if tool.name == chosen]
    elif choice not in (None, NONE, *CHOICES):
        choices = ", ".join((NONE, *CHOICES))
        raise Refused(f"tool_choice is none of {choices} and names no function", param="tool_choice")
    if not tools and (chosen is not None or CHOICES.get(choice)):
        raise Refused("tool_choice asks for a tool that tools does not have", param="tool_choice")
    if not tools or choice == NONE:
        return None
    must = chosen is not None or CHOICES[choice or "auto"]
    return Offer(tuple(tools), must, chosen is None and given("parallel_tool_calls") is not False)


def _tool(tool: Any, at: int) -> Tool:
    where, function = f"tools[{at}]", _within(tool, "function")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(f"{where} is no function with a name of letters, digits, _ and -, 64 at most", param=where)
    if parameters is None:  # as OpenAI's API: a function without arguments
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise Refused(f"{where} has parameters that are no schema of an object", param=where)
    described = function.get("description")
    return Tool(name, {"type": "object"} | parameters, described if isinstance(described, str) else "")


def _within(value: Any, name: str) -> dict[str, Any]:
    """An object in an object; an empty one where there is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _chosen(choice: Any) -> str | None:
    """The function that a choice names."""
    name = _within(choice, "function").get("name")
    return name if isinstance(name, str) else None


def past_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """`tool_calls` of a message, as templates get them: arguments are an object.

    Those that were cut, or are no JSON of an object, stay the text that they are.
    """
    found = []
    for call in calls if isinstance(calls, list) else [{}]:
        function = _within(call, "function")
        name, text = function.get("name"), function.get("arguments") or "{}"  # "" where there are none
        if not isinstance(name, str) or not isinstance(text, str):
            raise Refused(f"{where}.tool_calls are no functions with a name and arguments in text", param=where)
        try:
            arguments = parse_json(text.encode(errors="surrogatepass"))
        except ValueError:
            arguments = None
        told = {"name": name, "arguments": arguments if isinstance(arguments, dict) else text}
        found.append({"id": call.get("id", ""), "type": "function", "function": told})
    return found


class Calls:
    """The calls of one choice, as the API writes them."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def deltas(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """Pieces of a stream for parts of calls, which are noted: one a call, for clients read no second one."""
        found: dict[int, dict[str, Any]] = {}
        for part in parts:
            if part.call is None:
                continue
            if part.call in found:
                self.all[-1]["function"]["arguments"] += part.text
                found[part.call]["function"]["arguments"] += part.text
            else:
                found[part.call] = self._delta(part)
        return list(found.values())

    def _delta(self, part: Part) -> dict[str, Any]:
        if part.name is not None:
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
            self.all.append(call | {"function": {"name": part.name, "arguments": ""}})
            return call | {"index": part.call, "function": {"name": part.name, "arguments": ""}}
        self.all[-1]["function"]["arguments"] += part.text
        return {"index": part.call, "function": {"arguments": part.text}}
