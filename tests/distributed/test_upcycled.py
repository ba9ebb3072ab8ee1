"""A real model made sparse: it must say what it said when it was dense, whatever its router picks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from upcycled import upcycle

from qwen_ray import LLM, SamplingParams

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, there was a fox who"]
NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
OPTIONS = {"dtype": "float32", "kv_cache_memory": "32MiB", "max_num_seqs": 4, "max_model_len": 256}


def answers(model: Path, quantization: str = "none") -> list[tuple[int, ...]]:
    with LLM(str(model), quantization=quantization, **OPTIONS) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def test_equal_experts_say_what_the_dense_model_says(demo_gguf: Path, upcycled_demo: Path) -> None:
    assert answers(upcycled_demo) == answers(demo_gguf)


@pytest.fixture(scope="module")
def one_of_three(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = upcycle(demo_gguf, tmp_path_factory.mktemp("one-of-three"), num_experts=3, top_k=1)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_single_quantized_expert_says_it_to_the_last_bit(
    demo_gguf: Path, one_of_three: Path, quantization: str
) -> None:
    """Its weight is exactly 1. Halves of a sum differ in the last bit, which rounded activations make more of."""
    assert answers(one_of_three, quantization) == answers(demo_gguf, quantization)


@pytest.fixture(scope="module")
def perturbed(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = upcycle(demo_gguf, tmp_path_factory.mktemp("perturbed"), num_experts=3, perturbation=0.2)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors"
)  # the shared expert that transformers insists on
def test_different_experts_say_what_transformers_says(demo_gguf: Path, perturbed: Path) -> None:
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(perturbed)
    model = transformers.AutoModelForCausalLM.from_pretrained(perturbed, dtype=torch.float32)
    expected: list[tuple[int, ...]] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
        expected.append(tuple(out[0, ids.shape[1] :].tolist()))
    found = answers(perturbed)
    assert found == expected
    assert found != answers(demo_gguf)
