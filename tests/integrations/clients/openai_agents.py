"""`OpenAIChatCompletionsModel`: text, its stream, `output_type`, a tool and its result, both together"""

import asyncio
import os
from typing import Literal

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel


class Pet(BaseModel):
    kind: Literal["cat", "dog"]


called = []


@function_tool
def weather(city: Literal["Rome", "Oslo"]) -> str:
    """Of a city."""
    called.append(city)
    return "sunny"


async def main() -> None:
    client = AsyncOpenAI(base_url=os.environ["URL"], api_key="none", max_retries=0)
    model, plain = OpenAIChatCompletionsModel("tooled", client), ModelSettings(max_tokens=60, temperature=0)
    whole = await Runner.run(Agent("a", model=model, model_settings=plain), "x")
    stream = Runner.run_streamed(Agent("a", model=model, model_settings=plain), "x")
    assert [event async for event in stream.stream_events()]
    assert stream.final_output == whole.final_output
    pet = await Runner.run(Agent("a", model=model, model_settings=plain, output_type=Pet), "x")
    assert pet.final_output.kind in ("cat", "dog")
    must = ModelSettings(max_tokens=200, temperature=0, tool_choice="required", parallel_tool_calls=False)
    await Runner.run(Agent("a", model=model, model_settings=must, tools=[weather]), "x", max_turns=3)
    assert called
    both = Agent("a", model=model, model_settings=ModelSettings(max_tokens=200), tools=[weather], output_type=Pet)
    assert (await Runner.run(both, "x", max_turns=50)).final_output.kind in ("cat", "dog")


set_tracing_disabled(True)
asyncio.run(main())
