"""What a program with LangChain's ChatOpenAI does. URL and model are its arguments."""

import sys
from typing import Literal

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

url, model = sys.argv[1:]
common = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "max_retries": 0}
chat = ChatOpenAI(**common, max_tokens=1000, seed=1)


class Paint(BaseModel):
    """Paints."""

    colour: Literal["red", "blue"]
    count: int = Field(ge=0, le=9)


answer = ChatOpenAI(**common, max_tokens=8, temperature=0).invoke("Hi")
assert answer.usage_metadata["output_tokens"] <= 8
streamed = list(ChatOpenAI(**common, max_tokens=8, temperature=0, stream_usage=True).stream("Hi"))
assert "".join(chunk.content for chunk in streamed) == answer.content
assert streamed[-1].usage_metadata or any(chunk.usage_metadata for chunk in streamed)

called = chat.bind_tools([Paint], tool_choice="any", parallel_tool_calls=False).invoke("Hi")
assert called.tool_calls[0]["name"] == "Paint"
assert called.tool_calls[0]["args"]["colour"] in ("red", "blue")

for method in ("json_schema", "function_calling"):
    found = chat.with_structured_output(Paint, method=method).invoke("Hi")
    assert isinstance(found, Paint), method

assert isinstance(OpenAI(**common, max_tokens=4).invoke("Hi"), str)
