"""both routes, streams, tools"""

import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["URL"], api_key="none", max_retries=0)
ask = {"model": "tooled", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "temperature": 0}
assert client.completions.create(model="tooled", prompt="def ", max_tokens=4).choices[0].text
pieces = list(client.chat.completions.create(**ask, stream=True))
whole = client.chat.completions.create(**ask).choices[0]
assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content
schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
schema["additionalProperties"] = False
tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
choice = {"type": "function", "function": {"name": "weather"}}
found = client.chat.completions.create(**ask, tools=tools, tool_choice=choice).choices[0]
assert json.loads(found.message.tool_calls[0].function.arguments)["city"] in ("Rome", "Oslo")
