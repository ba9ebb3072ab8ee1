"""What a program with litellm does. URL and model are its arguments."""

import asyncio
import json
import sys

import litellm

url, model = sys.argv[1:]
litellm.telemetry = False
common = {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
HI = [{"role": "user", "content": "Hi"}]
PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {"type": "object", "properties": {"colour": {"enum": ["red"]}}, "required": ["colour"]},
    },
}

for provider in ("hosted_vllm", "openai"):
    named = {**common, "model": f"{provider}/{model}"}
    answer = litellm.completion(**named, messages=HI, max_tokens=8, temperature=0)
    assert answer.usage.completion_tokens <= 8
    chunks = list(litellm.completion(**named, messages=HI, max_tokens=8, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
        answer.choices[0].message.content or ""
    )
    called = litellm.completion(**named, messages=HI, tools=[PAINT], tool_choice="required", max_tokens=1000, seed=1)
    call = called.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"colour": "red"}
    try:
        litellm.completion(**named, messages=HI, temperature=-1)
    except litellm.BadRequestError:
        continue
    raise AssertionError("temperature -1 was taken")

text = litellm.text_completion(
    model=f"text-completion-openai/{model}", api_base=f"{url}/v1", api_key="none", prompt="Hi", max_tokens=4
)
assert text.choices[0].finish_reason in ("length", "stop")
answer = asyncio.run(litellm.acompletion(**common, messages=HI, max_tokens=4))
assert answer.choices
