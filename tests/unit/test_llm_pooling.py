"""Vectors and scores in one process against transformers', on tiny random checkpoints as they are published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from retrieval_models import INSTRUCTION, pair_ids, scores, token_ids, vectors, write_embedder, write_reranker

from qwen_ray import LLM
from qwen_ray.core.errors import InvalidRequest

TOLERANCE = 1e-4
OPTIONS = {"kv_cache_memory": "2MiB", "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}
LONG = "The quick brown fox jumps over the lazy dog. " * 5  # several steps; more than one block is shared
TEXTS = ["Beijing is the capital of China.", LONG, LONG + "Twice!", "世界"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Path]]:
    path = write_embedder(tmp_path_factory.mktemp("embedder"))
    with LLM(str(path), **OPTIONS) as llm:
        yield llm, path
        assert llm.stats()[0].num_used_blocks == 0


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Path]]:
    path = write_reranker(tmp_path_factory.mktemp("reranker"))
    with LLM(str(path), **OPTIONS) as llm:
        yield llm, path
        assert llm.stats()[0].num_used_blocks == 0


def test_vectors_are_those_of_transformers(embedder: tuple[LLM, Path]) -> None:
    llm, path = embedder
    ids = [token_ids(path, text) for text in TEXTS]
    assert all(prompt[-1] == 256 for prompt in ids)
    hits = llm.stats()[0].prefix_hits_total
    for dimensions in (None, 20):
        expected = vectors(path, ids, dimensions)
        for given in (TEXTS, ids, TEXTS):  # the second and third time from the prefix cache
            got = torch.tensor(llm.embed(given, dimensions=dimensions))
            assert got.shape == expected.shape
            assert (got - expected).abs().max().item() <= TOLERANCE
    assert llm.stats()[0].prefix_hits_total > hits


def test_an_instruction_goes_before_a_query(embedder: tuple[LLM, Path]) -> None:
    llm, path = embedder
    expected = vectors(path, [token_ids(path, f"Instruct: {INSTRUCTION}\nQuery:{TEXTS[0]}")])
    got = torch.tensor(llm.embed(TEXTS[0], instruction=INSTRUCTION))
    assert (got - expected).abs().max().item() <= TOLERANCE


def test_scores_are_those_of_transformers(reranker: tuple[LLM, Path]) -> None:
    llm, path = reranker
    expected = scores(path, [pair_ids(path, "What is the capital?", text) for text in TEXTS])
    assert max(expected) - min(expected) > 0.01
    assert llm.score("What is the capital?", TEXTS) == pytest.approx(expected, abs=TOLERANCE)
    expected = scores(path, [pair_ids(path, "q", TEXTS[0], "Find lies")])
    assert llm.score("q", TEXTS[:1], instruction="Find lies") == pytest.approx(expected, abs=TOLERANCE)


def test_each_does_what_it_was_loaded_for(embedder: tuple[LLM, Path], reranker: tuple[LLM, Path]) -> None:
    with pytest.raises(InvalidRequest, match="task='embed'; needed is generate"):
        embedder[0].generate("x")
    with pytest.raises(InvalidRequest, match="task='embed'; needed is generate or score"):
        embedder[0].score("x", ["y"])
    with pytest.raises(InvalidRequest, match="task='generate'; needed is embed"):
        reranker[0].embed("x")
    with pytest.raises(InvalidRequest, match="between 1 and 48"):
        embedder[0].embed("x", dimensions=49)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        embedder[0].embed([[]])
