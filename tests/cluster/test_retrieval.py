"""Vectors and scores through HTTP against transformers', from real servers of tiny random checkpoints."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from retrieval_models import INSTRUCTION, pair_ids, scores, token_ids, vectors, write_embedder, write_reranker
from served import serving

TOLERANCE = 1e-4
OPTIONS = ("--dtype", "float32", "--kv-cache-memory", "2MiB", "--max-num-batched-tokens", "64")
LONG = "The quick brown fox jumps over the lazy dog. " * 8
TEXTS = ["Beijing is the capital of China.", LONG, LONG + "Twice!", "世界", ""]
QUERY = "What is the capital?"


def test_vectors_are_those_of_transformers_also_after_a_rank_s_death(tmp_path: Path) -> None:
    """Of a checkpoint whose files say that it embeds, over two ranks, of which one is killed under way."""
    path = write_embedder(tmp_path / "tiny")
    with serving(str(path), "--tp", "2", *OPTIONS) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:

        def embed(given: Any, **more: Any) -> torch.Tensor:
            answer = client.embeddings.create(model="tiny", input=given, **more)
            return torch.tensor([item.embedding for item in answer.data])

        def differ(got: torch.Tensor, prompts: list[list[int]], dimensions: int | None = None) -> float:
            return (got - vectors(path, prompts, dimensions)).abs().max().item()

        ids = [token_ids(path, text) for text in TEXTS]
        assert differ(embed(TEXTS), ids) <= TOLERANCE  # the client asks for base64 by itself
        assert differ(embed(TEXTS, encoding_format="float"), ids) <= TOLERANCE
        assert differ(embed(ids), ids) <= TOLERANCE
        assert differ(embed(TEXTS[1]), ids[1:2]) <= TOLERANCE
        assert differ(embed(ids[0]), ids[:1]) <= TOLERANCE
        assert differ(embed(TEXTS, dimensions=20), ids, 20) <= TOLERANCE
        query = [token_ids(path, f"Instruct: {INSTRUCTION}\nQuery:{QUERY}")]
        assert differ(embed(QUERY, extra_body={"instruction": INSTRUCTION}), query) <= TOLERANCE
        assert differ(embed(QUERY, extra_body={"prompt_name": "query"}), query) <= TOLERANCE
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_task")

        many = [f"{i} {LONG}" for i in range(100)]
        (replica,) = httpx.get(f"{url}/status", timeout=60).json()["replicas"]
        with ThreadPoolExecutor(max_workers=1) as pool:
            answer = pool.submit(embed, many)
            os.kill(replica["ranks"][1]["pid"], signal.SIGKILL)
            assert differ(answer.result(), [token_ids(path, text) for text in many]) <= TOLERANCE
        (replica,) = httpx.get(f"{url}/status", timeout=60).json()["replicas"]
        assert replica["num_repairs"] == 1


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    """Of a checkpoint as Qwen3-Reranker's, whose files say nothing of it."""
    path = write_reranker(tmp_path / "tiny")
    expected = scores(path, [pair_ids(path, QUERY, text) for text in TEXTS])
    order = sorted(range(len(TEXTS)), key=lambda i: -expected[i])
    with serving(str(path), *OPTIONS) as url:
        scored = httpx.post(f"{url}/v1/score", json={"text_1": QUERY, "text_2": TEXTS}, timeout=60).json()
        assert [item["score"] for item in scored["data"]] == pytest.approx(expected, abs=TOLERANCE)
        ranked = httpx.post(f"{url}/v1/rerank", json={"query": QUERY, "documents": TEXTS}, timeout=60).json()
        assert [result["index"] for result in ranked["results"]] == order
        assert [result["relevance_score"] for result in ranked["results"]] == pytest.approx(
            [expected[i] for i in order], abs=TOLERANCE
        )
        body = {"query": QUERY, "documents": TEXTS[:1], "instruction": "Find lies"}
        ranked = httpx.post(f"{url}/v1/rerank", json=body, timeout=60).json()
        (lied,) = scores(path, [pair_ids(path, QUERY, TEXTS[0], "Find lies")])
        assert ranked["results"][0]["relevance_score"] == pytest.approx(lied, abs=TOLERANCE)
        refused = httpx.post(f"{url}/v1/embeddings", json={"input": "x"}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_task")
