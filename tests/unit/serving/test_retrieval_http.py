"""Vectors and scores of a real model over real HTTP against transformers', on tiny random checkpoints."""

from __future__ import annotations

import base64
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from retrieval_models import INSTRUCTION, pair_ids, scores, token_ids, vectors, write_embedder, write_reranker

from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec
from qwen_ray.source.config_file import load_config
from qwen_ray.source.purpose import load_purpose
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.worker.local import LocalExecutor
from tests.unit.serving.conftest import Server

TOLERANCE = 1e-4
# Prompts come in several chunks, and share blocks.
ENGINE = EngineConfig(num_blocks=200, block_size=16, max_model_len=1024, max_num_batched_tokens=64)
LONG = "The quick brown fox jumps over the lazy dog. " * 8
TEXTS = ["Beijing is the capital of China.", LONG, LONG + "Twice!", "世界", ""]
QUERY = "What is the capital?"


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Server]:
    purpose = load_purpose(path)
    config = purpose.applied(load_config(path))
    plan = ParallelPlan.of(config)
    executor = LocalExecutor(
        ReplicaSpec(name="tiny", path=str(path), config=config, plan=plan, engine=ENGINE, dtype="float32")
    )
    about = {"task": purpose.task, "embedding": purpose.embedding, "hidden_size": config.hidden_size}
    server = Server(Tokenizer.load(path), ENGINE, about=about, executor=executor)
    try:
        yield await server.start(num_replicas=1)
    finally:
        await server.stop()
        executor.close()


async def ask(server: Server, path: str, **body: Any) -> dict[str, Any]:
    response = await server.client.post(path, json={"model": "tiny", **body}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


async def test_vectors_are_those_of_transformers(tmp_path: Path) -> None:
    path = write_embedder(tmp_path)
    ids = [token_ids(path, text) for text in TEXTS]
    query = [token_ids(path, f"Instruct: {INSTRUCTION}\nQuery:{QUERY}")]
    async with serving(path) as server:
        for given, prompts, dimensions, more in (
            (TEXTS, ids, None, {}),
            (ids, ids, None, {}),
            (TEXTS, ids, 20, {}),
            (TEXTS[1], ids[1:2], None, {}),
            (ids[0], ids[:1], None, {}),
            (QUERY, query, None, {"instruction": INSTRUCTION}),
            (QUERY, query, None, {"prompt_name": "query"}),
        ):
            expected = vectors(path, prompts, dimensions)
            answer = await ask(server, "/v1/embeddings", input=given, dimensions=dimensions, **more)
            got = torch.tensor([item["embedding"] for item in answer["data"]])
            assert (got - expected).abs().max().item() <= TOLERANCE
            answer = await ask(
                server, "/v1/embeddings", input=given, dimensions=dimensions, encoding_format="base64", **more
            )
            got = torch.tensor([array("f", base64.b64decode(item["embedding"])).tolist() for item in answer["data"]])
            assert (got - expected).abs().max().item() <= TOLERANCE
        assert server.replicas[0].engine.stats().prefix_hits_total > 0


async def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    path = write_reranker(tmp_path)
    expected = scores(path, [pair_ids(path, QUERY, text) for text in TEXTS])
    order = sorted(range(len(TEXTS)), key=lambda i: -expected[i])
    async with serving(path) as server:
        scored = await ask(server, "/v1/score", text_1=QUERY, text_2=TEXTS)
        assert [item["score"] for item in scored["data"]] == pytest.approx(expected, abs=TOLERANCE)
        ranked = await ask(server, "/v1/rerank", query=QUERY, documents=TEXTS)
        assert [result["index"] for result in ranked["results"]] == order
        found = [result["relevance_score"] for result in ranked["results"]]
        assert found == pytest.approx([expected[i] for i in order], abs=TOLERANCE)
