"""The same two workloads by transformers' own `generate`, with its default cache: what qwen-ray is held against.

Knows transformers, which is asked for where it is used: it may not be installed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from gpu_device import Device, Limits
from gpu_models import MODELS, Model, Sizes
from gpu_rows import PEER, Row
from gpu_work import StepWork, decode_work, prefill_operations

NUM_ROUNDS = 3


def measure_transformers(name: str, sizes: Sizes, device: Device, limits: Limits) -> Iterator[Row]:
    """`name` is that of one of the models. Random weights, made on the device; attention by torch (SDPA)."""
    own = PEER + name
    if find_spec("transformers") is None:
        yield Row(model=own, what="", note="transformers is not installed")
        return
    model, peer = MODELS[name], load(MODELS[name], device)
    step = decode_seconds(device, peer, sizes)
    work = decode_work(model.config, model.dtype, 1, sizes.context + sizes.num_outputs / 4)
    yield Row(
        model=own,
        what=f"decode 1 x {sizes.context}",
        tokens_per_second=1 / step,
        bandwidth_fraction=work.bandwidth_fraction(step, limits.read_bandwidth),
        rate_fraction=work.rate_fraction(step, limits.product_rate),
        step_seconds=step,
    )
    seconds = prefill_seconds(device, peer, sizes)
    work = StepWork(num_bytes=0, operations=prefill_operations(model.config, sizes.num_prompts, sizes.prompt_length))
    yield Row(
        model=own,
        what=f"prefill {sizes.num_prompts} x {sizes.prompt_length}",
        tokens_per_second=sizes.num_prompts * sizes.prompt_length / seconds,
        rate_fraction=work.rate_fraction(seconds, limits.product_rate),
        step_seconds=seconds,
    )


def load(model: Model, device: Device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model.config.architecture, **_fields(model))
    torch.set_default_dtype(getattr(torch, model.dtype))
    with device.device:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def _fields(model: Model) -> dict[str, Any]:
    """As in config.json, what dense models have."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    fields: dict[str, Any] = {name: getattr(model.config, name) for name in names}
    return fields | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class StepClock:
    """Asked by `generate` after each token whether to stop: it never does, and keeps the time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decode_seconds(device: Device, peer: Any, sizes: Sizes) -> float:
    """Of the median step: `generate` waits for the device in each, to learn whether it was the last."""
    seconds: list[float] = []
    for _ in range(NUM_ROUNDS):
        clock = StepClock()
        _generate(device, peer, 1, sizes.context, sizes.num_outputs // 2, clock)
        seconds.append(statistics.median(b - a for a, b in pairwise(clock.times)))
    return statistics.median(seconds)


def prefill_seconds(device: Device, peer: Any, sizes: Sizes) -> float:
    return statistics.median(
        device.seconds(lambda: _generate(device, peer, sizes.num_prompts, sizes.prompt_length, 1), NUM_ROUNDS)
    )


@torch.inference_mode()
def _generate(device: Device, peer: Any, num_prompts: int, length: int, num_outputs: int, *asked: StepClock) -> None:
    """Random prompts; greedy, as ours."""
    ids = torch.randint(peer.config.vocab_size, (num_prompts, length), device=device.device)
    found = peer.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_outputs,
        do_sample=False,
        stopping_criteria=list(asked),
    )
    found[0, -1].item()  # waits for the device
