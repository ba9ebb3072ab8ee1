"""What a program with OpenAI's Python client does. URL and model are its arguments."""

import asyncio
import json
import sys

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
HI = [{"role": "user", "content": "Hi"}]
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
PAINT = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": COLOUR}}


def models() -> None:
    assert [one.id for one in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def chat() -> None:
    answer = client.chat.completions.create(
        model=model, messages=HI, max_completion_tokens=12, temperature=0.5, seed=3, n=2, logprobs=True, top_logprobs=2
    )
    assert answer.id.startswith("chatcmpl-")
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.refusal is None
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def streamed_chat() -> None:
    options = {"model": model, "messages": HI, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == (whole.choices[0].message.content or "")
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.chat.completions.stream(model=model, messages=HI, seed=1) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
    assert said == (stream.get_final_completion().choices[0].message.content or "")


def tools() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "paint"}}):
        options = {"model": model, "messages": HI, "tools": [PAINT], "tool_choice": choice, "seed": 1}
        whole = client.chat.completions.create(**options, parallel_tool_calls=False, max_tokens=1000)
        (call,) = whole.choices[0].message.tool_calls
        assert whole.choices[0].finish_reason in ("tool_calls", "stop")
        assert call.function.name == "paint"
        assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
        with client.chat.completions.stream(**options, parallel_tool_calls=False, max_tokens=1000) as stream:
            for _ in stream:
                pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        assert streamed.function.arguments == call.function.arguments
    again = [*HI, whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    client.chat.completions.create(model=model, messages=again, tools=[PAINT], max_tokens=4)


def structured() -> None:
    schema = {"name": "colour", "strict": True, "schema": COLOUR}
    answer = client.chat.completions.create(
        model=model,
        messages=HI,
        response_format={"type": "json_schema", "json_schema": schema},
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        max_tokens=1000,
    )
    assert 0 <= json.loads(answer.choices[0].message.content)["count"] <= 9


def completions() -> None:
    answer = client.completions.create(model=model, prompt=["a", "b"], max_tokens=4, echo=True, logprobs=1)
    assert [choice.text[0] for choice in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    stream = client.completions.create(model=model, prompt="a", max_tokens=4, stream=True)
    assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")


def errors() -> None:
    wrong = (
        (openai.NotFoundError, {"model": "other", "messages": HI}),
        (openai.BadRequestError, {"model": model, "messages": HI, "temperature": -1}),
        (openai.BadRequestError, {"model": model, "messages": []}),
        (openai.BadRequestError, {"model": model, "messages": HI, "max_tokens": 10**6}),
    )
    for kind, body in wrong:
        told = ""
        try:
            client.chat.completions.create(**body)
        except kind as error:
            told = error.body["message"]
        assert told, body


async def many_at_once() -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as other:
        asked = (other.completions.create(model=model, prompt=f"{i}", max_tokens=8) for i in range(16))
        answers = await asyncio.gather(*asked)
    assert all(answer.choices for answer in answers)


for step in (models, chat, streamed_chat, tools, structured, completions, errors):
    step()
asyncio.run(many_at_once())
