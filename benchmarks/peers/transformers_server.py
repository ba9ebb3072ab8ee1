"""transformers behind the smallest server. Runs in that peer's environment.

    python -m benchmarks.peers.transformers_server FOLDER PORT KV_TOKENS continuous|static

Continuous batching is its own manager. `static` is `generate`: whoever waits is taken together, of one prompt length.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.completion_server import Engine, serve

Tokens = asyncio.Queue[list[int]]
PAGE_SIZE = 256
GATHER_SECONDS = 0.02  # that a static batch waits for more


class Continuous:
    def __init__(self, model: Any, kv_tokens: int) -> None:
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE, num_blocks=kv_tokens // PAGE_SIZE, max_batch_tokens=2048, max_requests_per_batch=256
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = model.init_continuous_batching(greedy, continuous_batching_config=config)
        self._manager.start()
        self._count = 0

    async def stream(self, prompt: list[int], num_tokens: int) -> AsyncIterator[list[int]]:
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._count += 1
        name = str(self._count)
        self._manager.register_result_handler(name, outputs.put_nowait)
        self._manager.add_request(prompt, name, max_new_tokens=num_tokens, streaming=True, eos_token_id=-1)
        given = 0
        while given < num_tokens:
            output = await outputs.get()
            if output.error:
                raise ConnectionError(output.error)
            if new := list(output.generated_tokens[given:num_tokens]):
                given += len(new)
                yield new


class Static:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._new: queue.SimpleQueue[tuple[list[int], int, Tokens]] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    async def stream(self, prompt: list[int], num_tokens: int) -> AsyncIterator[list[int]]:
        tokens: Tokens = asyncio.Queue()
        self._new.put((prompt, num_tokens, tokens))
        for _ in range(num_tokens):
            yield await tokens.get()

    def _run(self) -> None:
        waiting: list[tuple[list[int], int, Tokens]] = []
        while True:
            waiting = waiting or [self._new.get()]
            threading.Event().wait(GATHER_SECONDS)
            while not self._new.empty():
                waiting.append(self._new.get())
            length = len(waiting[0][0])
            batch = [one for one in waiting if len(one[0]) == length]
            waiting = [one for one in waiting if len(one[0]) != length]
            self._generate(batch)

    def _generate(self, batch: list[tuple[list[int], int, Tokens]]) -> None:
        prompts = torch.tensor([prompt for prompt, _, _ in batch])
        most = max(num_tokens for _, num_tokens, _ in batch)
        self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=most),
            streamer=_ToQueues(self._loop, [tokens for _, _, tokens in batch]),
        )


class _ToQueues(BaseStreamer):
    def __init__(self, loop: asyncio.AbstractEventLoop, queues: list[Tokens]) -> None:
        self._loop, self._queues, self._saw_prompt = loop, queues, False

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:
            for tokens, token in zip(self._queues, value.tolist(), strict=True):
                self._loop.call_soon_threadsafe(tokens.put_nowait, [token])
        self._saw_prompt = True

    def end(self) -> None:
        pass


async def main(folder: str, port: str, kv_tokens: str, way: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # answers have the length that was asked for
    engine: Engine = Continuous(model, int(kv_tokens)) if way == "continuous" else Static(model)
    await serve(engine, int(port))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
