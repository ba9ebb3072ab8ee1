"""OpenVINO GenAI's continuous batching behind the smallest server. Runs in that peer's environment.

python -m benchmarks.peers.openvino_server FOLDER PORT KV_GIB
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncIterator

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.completion_server import serve

Tokens = asyncio.Queue[list[int]]


class Pipeline:
    """Requests come in over a queue and are stepped on one thread; tokens go back to the event loop."""

    def __init__(self, folder: str, kv_gib: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = kv_gib
        scheduler.enable_prefix_caching = True
        scheduler.max_num_seqs = 256
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")
        self._new: queue.SimpleQueue[tuple[list[int], int, Tokens]] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    async def stream(self, prompt: list[int], num_tokens: int) -> AsyncIterator[list[int]]:
        tokens: Tokens = asyncio.Queue()
        self._new.put((prompt, num_tokens, tokens))
        left = num_tokens
        while left > 0:
            ids = await tokens.get()
            left -= len(ids)
            yield ids

    def _run(self) -> None:
        count = 0
        running: list[tuple[openvino_genai.GenerationHandle, Tokens]] = []
        while True:
            while not (running and self._new.empty()):
                prompt, num_tokens, tokens = self._new.get()  # waits when there is nothing to do
                config = openvino_genai.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
                ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
                running.append((self._pipeline.add_request(count, ids, config), tokens))
                count += 1
            self._pipeline.step()
            for handle, tokens in running:
                if handle.can_read():
                    new = [token for output in handle.read().values() for token in output.generated_ids]
                    self._loop.call_soon_threadsafe(tokens.put_nowait, new)
            running = [
                (handle, tokens)
                for handle, tokens in running
                if handle.get_status() == openvino_genai.GenerationStatus.RUNNING
            ]


async def main(folder: str, port: str, kv_gib: str) -> None:
    await serve(Pipeline(folder, int(kv_gib)), int(port))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
