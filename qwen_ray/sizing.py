"""From the wish to the question: Settings, a model and machines make the planner's request.

The one page where a settings key meets a planner field. Decides nothing itself, and refuses wishes that do not go
together.
"""

from __future__ import annotations

import json
from pathlib import Path

from qwen_ray.config import ModelSettings, PlanSettings, Settings
from qwen_ray.core.errors import SettingsError
from qwen_ray.core.hardware import Hardware
from qwen_ray.core.model_config import ModelConfig, Quantization
from qwen_ray.planner.candidate import PlanRequest, Slo
from qwen_ray.planner.experts import ExpertLoadFile


def plan_request(
    settings: Settings,
    model: ModelSettings,
    config: ModelConfig,
    hardware: Hardware,
    *,
    dp: int | None = None,
    only_plan: bool = False,
) -> PlanRequest:
    """What `planner.search.plan` is asked for one model; `dp` is a number of copies that must fit, None for any.

    `only_plan`: nothing will be started, so what cannot be served may be asked for. Raises SettingsError.
    """
    if model.dtype == "fp8" and not only_plan:
        raise SettingsError(
            "models.0.dtype: fp8 can be planned with, not served; serve with bfloat16.", field="models.0.dtype"
        )
    _refuse_experts_of_none(model, config)
    quantization = _quantization(model, config)
    degrees = model.plan if isinstance(model.plan, PlanSettings) else PlanSettings()
    engine = settings.engine
    return PlanRequest(
        config=config,
        hardware=hardware,
        model=model.name,
        dtype=_dtype(model, config, hardware, quantization),
        quantization=quantization,
        tp=degrees.tp,
        pp=degrees.pp,
        dp=dp,
        ep=degrees.ep,
        dp_attention=degrees.dp_attention,
        num_redundant_experts=model.experts.num_redundant_experts,
        expert_load=_read_expert_load(model.experts.load, config) if model.experts.load else None,
        eplb_interval=model.experts.rebalance_seconds,
        max_model_len=model.max_model_len,
        slo=Slo(ttft=model.slo.ttft, tpot=model.slo.tpot),
        memory_utilization=engine.gpu_memory_utilization,
        kv_memory_bytes=engine.kv_cache_memory,
        block_size=engine.block_size,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_waiting=engine.max_num_waiting,
        light_tenant_slowdown=engine.light_tenant_slowdown,
        enable_prefix_caching=engine.enable_prefix_caching,
        standby_ranks=engine.standby_ranks,
        deterministic=engine.deterministic,
    )


def _refuse_experts_of_none(model: ModelSettings, config: ModelConfig) -> None:
    """What is asked of a dense model's experts is an error, not nothing; degrees are the planner's to refuse."""
    if config.moe:
        return
    for key in ("num_redundant_experts", "enable_eplb", "load"):
        if value := getattr(model.experts, key):
            field = f"models.0.experts.{key}"
            raise SettingsError(f"{field}: {model.name} has no experts (got {value!s}).", field=field)


def _quantization(model: ModelSettings, config: ModelConfig) -> Quantization:
    """What was asked for; `auto` is int4 for a checkpoint whose 4 bits can stay as they are. Raises SettingsError where
    weights cannot be both in few bits and in FP8."""
    if model.quantization == "auto":
        is_kept = config.packed is not None and config.packed.is_kept
        return "int4" if is_kept and model.dtype != "fp8" else "none"
    if model.quantization != "none" and model.dtype == "fp8":
        field = "models.0.quantization"
        raise SettingsError(
            f"{field}: {model.quantization} and dtype fp8 exclude each other; compute in bfloat16.", field=field
        )
    return model.quantization


def _dtype(model: ModelSettings, config: ModelConfig, hardware: Hardware, quantization: Quantization) -> str | None:
    """None: the checkpoint's own. On CPUs, kernels for few bits compute in float32 or bfloat16."""
    if model.dtype != "auto":
        return model.dtype
    is_cpu = all(node.device.kind == "cpu" for node in hardware.nodes)
    return "bfloat16" if is_cpu and quantization != "none" and config.dtype == "float16" else None


def _read_expert_load(file: Path, config: ModelConfig) -> tuple[tuple[float, ...], ...]:
    """Raises SettingsError naming the file and what is wrong with it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}.", field="models.0.experts.load") from error
    except ValueError as error:
        raise SettingsError(f"{file}: is not JSON: {error}.", field="models.0.experts.load") from error
    load = ExpertLoadFile.from_json(value, origin=str(file))
    load.check(config, origin=str(file))
    return load.expert_tokens
