"""What a program with Qwen-Agent does: a model by its address, functions, an agent. URL and model are its arguments."""

import sys

from qwen_agent.agents import Assistant
from qwen_agent.llm import get_chat_model

url, model = sys.argv[1:]
HI = [{"role": "user", "content": "Hi"}]
settings = {
    "model": model,
    "model_server": f"{url}/v1",
    "api_key": "none",
    "generate_cfg": {"max_tokens": 40, "seed": 1, "max_retries": 0},
}
chat = get_chat_model(settings)
*_, last = chat.chat(messages=HI, stream=True)
whole = chat.chat(messages=HI, stream=False)
assert last[-1]["role"] == whole[-1]["role"] == "assistant"

native = get_chat_model({**settings, "generate_cfg": {**settings["generate_cfg"], "use_raw_api": True}})
PAINT = {"name": "paint", "description": "Paints.", "parameters": {"type": "object", "properties": {}}}
*_, called = native.chat(
    messages=HI, functions=[PAINT], stream=True, extra_generate_cfg={"tool_choice": "required", "max_tokens": 1000}
)
assert called[-1]["function_call"]["name"] == "paint", called

*_, said = Assistant(llm=settings).run(messages=HI)
assert said[-1]["role"] == "assistant"
