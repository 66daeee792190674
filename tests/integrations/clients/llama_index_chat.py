"""`OpenAILike` on both routes: `chat`, `complete`, their streams, `chat_with_tools`, `structured_predict`"""

import os
from typing import Literal

from llama_index.core import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]


def weather(city: Literal["Rome", "Oslo"]) -> str:
    """Of a city."""
    return "sunny"


where = {"api_base": os.environ["URL"], "api_key": "none", "max_retries": 0, "model": "tooled", "max_tokens": 200}
for chats in (True, False):
    model = OpenAILike(**where, is_chat_model=chats, temperature=0)
    assert list(model.stream_complete("x"))[-1].text == model.complete("x").text
model = OpenAILike(**where, is_chat_model=True, is_function_calling_model=True, temperature=0)
found = model.chat_with_tools([FunctionTool.from_defaults(weather)], user_msg="x", tool_required=True)
assert model.get_tool_calls_from_response(found)[0].tool_kwargs["city"] in ("Rome", "Oslo")
assert model.structured_predict(Pet, PromptTemplate("x")).kind in ("cat", "dog")
