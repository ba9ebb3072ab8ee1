"""How much a real model loses by bfloat16 and by quantized weights: perplexity of a fixed text, beside float32's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qwen_ray import LLM, SamplingParams

TEXT = (Path(__file__).parent / "harbour.txt").read_text(encoding="utf-8")
SCORE = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


def perplexity(model: Path, dtype: str, quantization: str = "none") -> float:
    options = {"dtype": dtype, "quantization": quantization, "kv_cache_memory": "64MiB", "max_model_len": 1024}
    with LLM(str(model), max_num_seqs=1, **options) as llm:
        (output,) = llm.generate(TEXT, SCORE)
    logprobs = [entry.logprob for entry in output.prompt_logprobs]
    assert len(logprobs) > 700
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.fixture(scope="module")
def exact(demo_gguf: Path) -> float:
    return perplexity(demo_gguf, "float32")


@pytest.mark.parametrize(
    ("dtype", "quantization", "limit"),
    [("bfloat16", "none", 0.002), ("float32", "int8", 0.005), ("float32", "int4", 0.05)],
)
def test_a_rounded_model_is_about_as_good(
    demo_gguf: Path, exact: float, dtype: str, quantization: str, limit: float
) -> None:
    assert perplexity(demo_gguf, dtype, quantization) == pytest.approx(exact, rel=limit)
