"""`completion`, streams, tools and their results, a schema, `text_completion`; as `openai/` and `hosted_vllm/`"""

import os
from typing import Literal

import litellm
from pydantic import BaseModel


class Pet(BaseModel):
    kind: Literal["cat", "dog"]


where = {"api_base": os.environ["URL"], "api_key": "none", "max_tokens": 200, "num_retries": 0}
messages = [{"role": "user", "content": "x"}]
schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
schema["additionalProperties"] = False
tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
for model in ("openai/tooled", "hosted_vllm/tooled"):
    ask = {"model": model, "messages": messages} | where
    pieces = list(litellm.completion(**ask, temperature=0, stream=True))
    whole = litellm.completion(**ask, temperature=0).choices[0].message.content
    assert litellm.stream_chunk_builder(pieces).choices[0].message.content == whole
    found = (
        litellm.completion(**ask, tools=tools, tool_choice="required", parallel_tool_calls=False).choices[0].message
    )
    result = {"role": "tool", "tool_call_id": found.tool_calls[0].id, "content": "sunny"}
    assert litellm.completion(**ask | {"messages": [*messages, found, result]}, tools=tools).choices
    Pet.model_validate_json(litellm.completion(**ask, response_format=Pet).choices[0].message.content)
text = litellm.text_completion(model="text-completion-openai/tooled", prompt=["a", "b"], logprobs=2, **where)
assert len(text.choices) == 2
