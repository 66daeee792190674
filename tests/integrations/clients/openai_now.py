"""both routes, streams, `logprobs`, `parse`, `stream` with tools, errors"""

import os
from typing import Literal

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=os.environ["URL"], api_key="none", max_retries=0)
ask = {"model": "tooled", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200}
schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
schema["additionalProperties"] = False
tools = [{"type": "function", "function": {"name": "weather", "strict": True, "parameters": schema}}]


class Pet(BaseModel):
    kind: Literal["cat", "dog"]


assert client.models.retrieve("tooled").id in [model.id for model in client.models.list()]
text = client.completions.create(model="tooled", prompt="def ", max_tokens=4, logprobs=2)
assert "".join(text.choices[0].logprobs.tokens) == text.choices[0].text
parsed = client.chat.completions.parse(**ask, response_format=Pet)
assert parsed.choices[0].message.parsed.kind in ("cat", "dog")
with client.chat.completions.stream(**ask, tools=tools, tool_choice="required") as stream:
    for _ in stream:
        pass
    call = stream.get_final_completion().choices[0].message.tool_calls[0]
assert call.function.parsed_arguments["city"] in ("Rome", "Oslo")
for route in (client.responses, client.embeddings):
    try:
        route.create(model="tooled", input="x")
        said = ""
    except openai.NotFoundError as error:
        said = error.message
    assert "/v1/chat/completions" in said
