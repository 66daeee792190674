"""`Agent` on `OpenAIChatModel`: text, its stream, `ToolOutput`, `NativeOutput`, the last beside a tool"""

import asyncio
import os
from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]


def weather(city: Literal["Rome", "Oslo"]) -> str:
    """Of a city."""
    return "sunny"


async def streamed() -> str:
    async with Agent(model, instructions="x").run_stream("x") as found:
        return [text async for text in found.stream_text()][-1]


model = OpenAIChatModel(
    "tooled",
    provider=OpenAIProvider(base_url=os.environ["URL"], api_key="none"),
    settings={"max_tokens": 200, "temperature": 0},
)
assert asyncio.run(streamed()) == Agent(model, instructions="x").run_sync("x").output
for output in (ToolOutput(Pet), NativeOutput(Pet)):
    assert Agent(model, output_type=output).run_sync("x").output.kind in ("cat", "dog")
assert Agent(model, output_type=NativeOutput(Pet), tools=[weather]).run_sync("x").output.kind in ("cat", "dog")
