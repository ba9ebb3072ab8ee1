"""How much a real model loses by bfloat16 and by quantized weights: perplexity of a fixed text, beside float32's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from packed_forms import CONFIGS, awq_of
from safetensors.torch import save_file
from upcycled import shape_of, write_tokenizer

from qwen_ray import LLM, SamplingParams
from qwen_ray.source.config_file import load_config
from qwen_ray.worker.gguf import open_gguf

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


@pytest.fixture(scope="module")
def awq_demo(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as AWQ's tools would write it."""
    folder, config = tmp_path_factory.mktemp("awq-demo"), load_config(demo_gguf)
    tensors: dict[str, torch.Tensor] = {}
    for name, stored in open_gguf(demo_gguf, config).items():
        weight, _ = stored.read(None, None, torch.float32)
        if name.endswith("_proj.weight"):
            tensors |= {name.removesuffix("weight") + last: part for last, part in awq_of(weight).items()}
        elif name != "lm_head.weight":  # the embedding's
            tensors[name] = weight.half()
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder, demo_gguf)
    raw = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": CONFIGS["awq"], **shape_of(config)}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_4_bits_that_stay_so_are_as_good_as_when_they_are_widened(awq_demo: Path, exact: float) -> None:
    kept, widened = (perplexity(awq_demo, "float32", how) for how in ("auto", "none"))
    assert kept == pytest.approx(widened, rel=0.02)
    assert exact < widened < 2 * exact  # rounded twice, this time without a least value of its own to each group
