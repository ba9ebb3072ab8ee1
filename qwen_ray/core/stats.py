"""What the processes say about themselves: plain numbers, made into metrics and tables elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStats:
    """One rank, as it sees itself. Sizes in bytes, times in seconds."""

    rank: int
    stage: int
    tp_rank: int
    pid: int
    node: str
    device: str
    weights_bytes: int = 0
    kv_bytes: int = 0
    memory_bytes: int = 0  # all that the process holds: RSS on CPU, allocated device memory on CUDA
    bytes_read: int = 0  # from the checkpoint
    load_seconds: float = 0.0
    num_loads: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    step_seconds: float = 0.0  # in total
    dp_rank: int = 0
    ep_rank: int = 0
    expert_tp_rank: int = 0
    first_layer: int = 0
    # Tokens that this rank's copies of each expert have computed: by layer, from `first_layer` on, and expert; () where
    # the layer is dense. A token counts once for each expert that it was sent to.
    expert_tokens: tuple[tuple[int, ...], ...] = ()
    num_moved_experts: int = 0  # received from other ranks while serving


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step, for histograms."""

    num_sequences: int
    num_tokens: int
    num_output_tokens: int
    schedule_seconds: float
    step_seconds: float  # submit to result, as the engine sees it
    rank_seconds: float  # of that, inside the sampling rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """When a finished request was where, seconds since the epoch, for histograms."""

    arrival: float
    first_scheduled: float
    first_token: float
    finished: float
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An engine at one moment; `*_total` only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0  # prompt tokens of waiting sequences still to be computed
    num_blocks: int = 0
    num_used_blocks: int = 0  # held by a sequence; cached blocks that could be evicted are not counted
    num_cached_blocks: int = 0  # evictable blocks whose content could still be hit
    block_size: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0  # computed, prefix hits not counted
    output_tokens_total: int = 0
    prefix_queries_total: int = 0  # in tokens, as in vLLM
    prefix_hits_total: int = 0
    preemptions_total: int = 0

    @property
    def kv_usage(self) -> float:
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0
