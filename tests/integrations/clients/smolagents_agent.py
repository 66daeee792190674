"""`OpenAIServerModel`: `generate`, its stream, tools, `ToolCallingAgent`"""

import os

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def weather(day: bool) -> str:
    """Of a day.

    Args:
        day: or of a night.
    """
    return "sunny"


model = OpenAIServerModel("tooled", api_base=os.environ["URL"], api_key="none", max_tokens=60, temperature=0)
messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
pieces = [piece.content or "" for piece in model.generate_stream(messages)]
assert "".join(pieces) == model.generate(messages).content
assert model.generate(messages, tools_to_call_from=[weather]).tool_calls
ToolCallingAgent(tools=[weather], model=model, max_steps=2, verbosity_level=0).run("x")
