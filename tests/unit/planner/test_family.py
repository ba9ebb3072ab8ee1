"""The table of architecture facts against published parameter counts and checkpoint sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_ray.planner.family import FAMILY, lookup

# Model cards and technical reports: billions of parameters, and active ones of the mixtures.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 0.494,
    "Qwen/Qwen2.5-1.5B": 1.544,
    "Qwen/Qwen2.5-3B": 3.09,
    "Qwen/Qwen2.5-7B-Instruct": 7.62,
    "Qwen/Qwen2.5-14B-Instruct": 14.77,
    "Qwen/Qwen2.5-32B-Instruct": 32.76,
    "Qwen/Qwen2.5-72B-Instruct": 72.71,
    "Qwen/Qwen2.5-Coder-32B-Instruct": 32.76,
    "Qwen/Qwen2-57B-A14B-Instruct": 57.4,
    "Qwen/Qwen1.5-MoE-A2.7B": 14.3,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-1.7B": 1.72,
    "Qwen/Qwen3-4B-Instruct-2507": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-14B": 14.77,
    "Qwen/Qwen3-32B": 32.76,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": 30.5,
    "Qwen/Qwen3-235B-A22B-Thinking-2507": 235.1,
    "Qwen/Qwen3-30B-A3B-Thinking-2507": 30.5,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": 480.2,
    "Qwen/Qwen2-0.5B-Instruct": 0.494,
    "Qwen/Qwen2-72B": 72.71,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.1345,
}
ACTIVE = {
    "Qwen2-57B-A14B": 14.2,
    "Qwen1.5-MoE-A2.7B": 2.7,
    "Qwen3-30B-A3B": 3.3,
    "Qwen3-235B-A22B": 22.2,
    "Qwen3-Coder-480B-A35B-Instruct": 35.5,
}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name: str, billions: float) -> None:
    config = lookup(name)
    assert config is not None
    assert config.num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(("name", "billions"), ACTIVE.items())
def test_active_parameter_counts_are_the_published_ones(name: str, billions: float) -> None:
    config = lookup(name)
    assert config is not None
    assert config.num_active_parameters / 1e9 == pytest.approx(billions, rel=2e-2)


def test_names_are_found_however_they_are_written() -> None:
    config = lookup("Qwen/Qwen2.5-72B-Instruct")
    assert config is not None
    assert lookup("qwen2.5-72b-instruct") is config
    assert lookup(" QWEN/qwen2.5-72B-INSTRUCT ") is config


def test_quantized_variants_are_known_too() -> None:
    plain, awq, fp8 = map(lookup, ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen3-8B-FP8"))
    assert plain is not None
    assert awq is not None
    assert awq.packed is not None
    assert awq.packed.is_kept
    assert replace(awq, packed=None, dtype=plain.dtype) == plain
    assert fp8 is not None
    assert fp8.packed is not None
    assert not fp8.packed.is_kept


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-7B-Instruct-GGUF",
        "Qwen/Qwen2.5-Coder-72B-Instruct-AWQ",
        "someone/Qwen2.5-7B-Instruct-AWQ",
        "Qwen/Qwen2.5-Coder-72B",  # never published
        "Qwen/Qwen3-32B-Base",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "someone/Qwen2.5-7B-Instruct",
        "./models/Qwen3-8B",
        "",
    ],
)
def test_what_is_not_known_is_none(name: str) -> None:
    assert lookup(name) is None


def test_facts_are_consistent() -> None:
    for name, config in FAMILY.items():
        assert config.num_attention_heads % config.num_key_value_heads == 0, name
        assert (config.moe is not None) == config.architecture.endswith("_moe"), name
        assert config.qkv_bias == config.architecture.startswith("qwen2"), name
        assert config.qk_norm == config.architecture.startswith("qwen3"), name
