"""What a program with instructor does: answers as pydantic models. URL and model are its arguments."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field

url, model = sys.argv[1:]
HI = [{"role": "user", "content": "Hi"}]


class Paint(BaseModel):
    colour: Literal["red", "blue"]
    count: int = Field(ge=0, le=9)


for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode)
    found, raw = client.chat.completions.create_with_completion(
        model=model, messages=HI, response_model=Paint, max_retries=0, max_tokens=1000, seed=1
    )
    assert found.colour in ("red", "blue"), mode
    assert raw.usage.completion_tokens > 0
