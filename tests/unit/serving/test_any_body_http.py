"""Bodies made at random out of the document's own fields: an answer or a 4xx, never a crash."""

from __future__ import annotations

import json
import random
from typing import Any

from qwen_ray.serving.routes import create_app

ROUTES = {
    "/v1/chat/completions": ("ChatRequest", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
    "/v1/completions": ("CompletionRequest", {"prompt": "Hi", "max_tokens": 3}),
    "/tokenize": ("TokenizeRequest", {"prompt": "Hi"}),
    "/detokenize": ("DetokenizeRequest", {"tokens": [1]}),
}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 2**63, 0.5, 1e308, "", "a", "auto", "none", "required", "\ud800", "<tool_call>"),
    *([], {}, [[]], [{}], {"a": []}, [1, "a"], ["a"], {"type": "json_object"}, [FUNCTION], FUNCTION, {"0": 1}, [257]),
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
    [{"role": "assistant", "content": "a", "prefix": True}],
    [{"role": "tool", "content": "a", "tool_call_id": "b"}],
    [{"role": "user", "content": [{"type": "image_url"}]}],
]


async def test_any_body(server: Any) -> None:
    models = create_app(server.service).openapi()["components"]["schemas"]
    dice = random.Random(6)
    statuses: list[int] = []
    for _ in range(250):
        path = dice.choice(list(ROUTES))
        model, valid = ROUTES[path]
        fields = dice.sample(sorted(models[model]["properties"]), k=dice.choice((1, 1, 2)))
        changes = {
            name: dice.choice(VALUES) for name in fields if name not in ("stream", "timeout", "structured_outputs")
        }
        body = {**valid, **changes}
        response = await server.client.post(
            path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        statuses.append(response.status_code)
        assert response.status_code in (200, 400, 404, 413), (path, body, response.text)
        if response.status_code != 200:
            assert response.json()["error"]["message"], body
    assert statuses.count(200) > 20
    assert statuses.count(400) > 20
    await server.until(server.is_idle)
