"""From the wish to the question: Settings, a model and machines make the planner's request.

The one page where a settings key meets a planner field. Decides nothing itself.
"""

from __future__ import annotations

from qwen_ray.config import ModelSettings, PlanSettings, Settings
from qwen_ray.core.hardware import Hardware
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.planner.candidate import PlanRequest, Slo


def plan_request(
    settings: Settings, model: ModelSettings, config: ModelConfig, hardware: Hardware, *, dp: int | None = None
) -> PlanRequest:
    """What `planner.search.plan` is asked for one model; `dp` is a number of copies that must fit, None for any."""
    degrees = model.plan if isinstance(model.plan, PlanSettings) else PlanSettings()
    engine = settings.engine
    return PlanRequest(
        config=config,
        hardware=hardware,
        model=model.name,
        dtype=None if model.dtype == "auto" else model.dtype,
        tp=degrees.tp,
        pp=degrees.pp,
        dp=dp,
        max_model_len=model.max_model_len,
        slo=Slo(ttft=model.slo.ttft, tpot=model.slo.tpot),
        memory_utilization=engine.gpu_memory_utilization,
        kv_memory_bytes=engine.kv_cache_memory,
        block_size=engine.block_size,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_waiting=engine.max_num_waiting,
        enable_prefix_caching=engine.enable_prefix_caching,
    )
