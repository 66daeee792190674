"""the modes TOOLS, TOOLS_STRICT and JSON_SCHEMA, whole and partial, and a retry"""

import os
from typing import Literal

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel, ConfigDict, field_validator


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]


class Never(Pet):
    @field_validator("kind")
    def refused(cls, kind: str) -> str:
        raise ValueError("no")


ask = {"model": "tooled", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=os.environ["URL"], api_key="none"), mode=mode)
    found = client.chat.completions.create(**ask, response_model=Pet, max_retries=1)
    parts = list(client.chat.completions.create_partial(**ask, response_model=Pet, max_retries=1))
    assert {found.kind, parts[-1].kind} <= {"cat", "dog"}
    try:
        client.chat.completions.create(**ask, response_model=Never, max_retries=2)
        attempts = 0
    except InstructorRetryException as error:
        attempts = error.n_attempts
    assert attempts > 1
