"""`from_openai`: text, its stream, a schema"""

import os
from typing import Literal

import openai
import outlines
from pydantic import BaseModel


class Pet(BaseModel):
    kind: Literal["cat", "dog"]


model = outlines.from_openai(openai.OpenAI(base_url=os.environ["URL"], api_key="none"), "tooled")
assert "".join(model.stream("x", max_tokens=8, temperature=0)) == model("x", max_tokens=8, temperature=0)
Pet.model_validate_json(model("x", Pet, max_tokens=200))
