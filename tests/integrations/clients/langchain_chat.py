"""`ChatOpenAI`: `invoke`, `stream`, `batch`, `bind_tools`, `with_structured_output` by schema and tool; `OpenAI`"""

import os
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]


@tool
def weather(city: Literal["Rome", "Oslo"]) -> str:
    """Of a city."""
    return "sunny"


where = {"base_url": os.environ["URL"], "api_key": "none", "max_retries": 0, "model": "tooled", "max_tokens": 200}
chat = ChatOpenAI(**where, temperature=0)
assert "".join(piece.content for piece in chat.stream("x")) == chat.invoke("x").content
assert len(chat.batch(["a", "b", "c"])) == 3
for method in ("json_schema", "function_calling"):
    assert chat.with_structured_output(Pet, method=method).invoke("x").kind in ("cat", "dog")
calls = chat.bind_tools([weather], tool_choice="weather", strict=True).invoke("x").tool_calls
assert calls[0]["args"]["city"] in ("Rome", "Oslo")
past = [SystemMessage("s"), HumanMessage("x"), AIMessage("", tool_calls=calls[:1])]
assert chat.bind_tools([weather]).invoke([*past, ToolMessage("sunny", tool_call_id=calls[0]["id"])])
assert "".join(OpenAI(**where, temperature=0).stream("def ")) == OpenAI(**where, temperature=0).invoke("def ")
