"""What processes observe, under the catalog's names. One recorder per process, each with a registry of its own.

`Instruments` are the metrics that grow by observing; numbers that a process merely has (EngineStats, RankStats) become
series when somebody collects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from qwen_ray.core.stats import (
    EngineStats,
    ExpertLoad,
    RankStats,
    RepairTimes,
    RequestTimes,
    ScalingStats,
    StartTimes,
    StepStats,
)
from qwen_ray.metrics.catalog import BY_OWNER, PROCESS_LABELS, Metric, Owner

# Of an ingress: read when somebody collects, not observed.
SAMPLED = (
    "qwen_ray_open_sequences",
    "qwen_ray_unplaced_sequences",
    "qwen_ray_replicas",
    "qwen_ray_price_per_hour",
    "qwen_ray_autoscaling_replicas",
    "qwen_ray_autoscaling_decisions_total",
)
REPLICA_STATES = ("loading", "ready", "repairing", "draining", "failed")
FINISH_REASONS = ("stop", "length", "abort", "error")


class Instruments:
    """The observed metrics of one process: those of `owner` that are named in `names`. They show from the start."""

    def __init__(self, registry: CollectorRegistry, owner: Owner, names: Iterable[str], process: Sequence[str]) -> None:
        rows = {metric.name: metric for metric in BY_OWNER[owner]}
        self._process = tuple(process)
        self._metrics = {name: _instrument(rows[name], PROCESS_LABELS[owner], registry) for name in names}
        # Looking a series up by its labels costs more than observing it.
        self._series: dict[tuple[str, ...], Counter | Histogram] = {}
        for name in self._metrics:
            if not rows[name].labels:
                self._one((name,))

    def observe(self, name: str, value: float) -> None:
        series = self._one((name,))
        assert isinstance(series, Histogram)
        series.observe(value)

    def count(self, name: str, amount: float = 1, *labels: str) -> None:
        series = self._one((name, *labels))
        assert isinstance(series, Counter)
        series.inc(amount)

    def _one(self, key: tuple[str, ...]) -> Counter | Histogram:
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._metrics[key[0]].labels(*self._process, *key[1:])
        return series


def _instrument(row: Metric, process_labels: tuple[str, ...], registry: CollectorRegistry) -> Counter | Histogram:
    labels = process_labels + row.labels
    if row.kind == "histogram":
        return Histogram(row.name, row.help, labels, registry=registry, buckets=row.buckets)
    return Counter(row.name, row.help, labels, registry=registry)


Values = Mapping[str, float | Mapping[tuple[str, ...], float]]  # name -> value, or labels -> value


class Snapshot(Collector):
    """Series made from numbers at the moment of collection."""

    def __init__(self, owner: Owner, read: Callable[[], Iterable[tuple[Sequence[str], Values]]]) -> None:
        self._owner: Owner = owner
        self._read = read

    def collect(self) -> Iterator[Family]:
        rows = {metric.name: metric for metric in BY_OWNER[self._owner]}
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for process, values in self._read():
            for name, value in values.items():
                row = rows[name]
                family = families.get(name)
                if family is None:
                    kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
                    family = kind(row.name, row.help, labels=[*PROCESS_LABELS[self._owner], *row.labels])
                    families[name] = family
                for labels, number in value.items() if isinstance(value, Mapping) else [((), value)]:
                    family.add_metric([*process, *labels], number)
        yield from families.values()

    def describe(self) -> Iterable[Family]:
        """Nothing: asking now would read numbers before there are any."""
        return ()


class IngressRecorder:
    """Sequences as the client sees them, and what is known of the application as a whole."""

    def __init__(self, model: str, ingress: str, price_per_hour: float | None = None) -> None:
        self.registry = CollectorRegistry()
        self.scaling: ScalingStats | None = None  # None until Serve has asked for the first time
        self._price_per_hour = price_per_hour
        names = [metric.name for metric in BY_OWNER["ingress"] if metric.name not in SAMPLED]
        self._instruments = Instruments(self.registry, "ingress", names, (model, ingress))
        for reason in FINISH_REASONS:
            self._instruments.count("vllm:request_success_total", 0, reason)
        self._process = (model, ingress)
        self.registry.register(Snapshot("ingress", self._read))
        self._state: Callable[[], tuple[int, int, Mapping[str, int]]] = lambda: (0, 0, {})

    def watch(self, state: Callable[[], tuple[int, int, Mapping[str, int]]]) -> None:
        """`state` gives (open sequences, those that wait for a replica, replicas by state) when somebody collects."""
        self._state = state

    def _read(self) -> Iterable[tuple[Sequence[str], Values]]:
        num_open, num_unplaced, replicas = self._state()
        states = {**dict.fromkeys(REPLICA_STATES, 0), **replicas}
        yield (
            self._process,
            {
                "qwen_ray_open_sequences": num_open,
                "qwen_ray_unplaced_sequences": num_unplaced,
                "qwen_ray_replicas": {(state,): float(count) for state, count in states.items()},
                **({} if self._price_per_hour is None else {"qwen_ray_price_per_hour": self._price_per_hour}),
                **({} if self.scaling is None else _scaling_values(self.scaling)),
            },
        )

    def http_request(self, route: str, status: int) -> None:
        self._instruments.count("qwen_ray_http_requests_total", 1, route, str(status))

    def dispatched(self, seconds: float) -> None:
        self._instruments.observe("qwen_ray_ingress_seconds", seconds)

    def hand_over(self) -> None:
        self._instruments.count("qwen_ray_hand_overs_total")

    def first_tokens(self, seconds: float, num_prompt_tokens: int, num_tokens: int) -> None:
        self._instruments.observe("vllm:time_to_first_token_seconds", seconds)
        self._instruments.count("vllm:prompt_tokens_total", num_prompt_tokens)
        self._instruments.count("vllm:generation_tokens_total", num_tokens)

    def prompt_tokens(self, num_prompt_tokens: int) -> None:
        """Of a prompt that no tokens follow."""
        self._instruments.count("vllm:prompt_tokens_total", num_prompt_tokens)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` that came together, `seconds` after the ones before."""
        for _ in range(num_tokens):
            self._instruments.observe("vllm:inter_token_latency_seconds", seconds / num_tokens)
        self._instruments.count("vllm:generation_tokens_total", num_tokens)

    def finished(self, times: RequestTimes) -> None:
        """Of one sequence, as the ingress saw it: `first_scheduled` is when it was handed to a replica."""
        observe = self._instruments.observe
        self._instruments.count("vllm:request_success_total", 1, times.finish_reason)
        observe("vllm:e2e_request_latency_seconds", times.finished - times.arrival)
        observe("qwen_ray_replica_seconds", times.finished - times.first_scheduled)
        observe("vllm:request_prompt_tokens", times.num_prompt_tokens)
        observe("vllm:request_generation_tokens", times.num_output_tokens)
        if times.num_output_tokens > 1:
            per_token = (times.finished - times.first_token) / (times.num_output_tokens - 1)
            observe("vllm:request_time_per_output_token_seconds", per_token)


def _scaling_values(scaling: ScalingStats) -> Values:
    names = ("target", "asked", "min", "max")
    return {
        "qwen_ray_autoscaling_replicas": {(name,): float(getattr(scaling, name)) for name in names},
        "qwen_ray_autoscaling_decisions_total": dict(scaling.decisions),
    }


class ReplicaRecorder:
    """An engine's steps and sequences, and, when collected, its numbers and its ranks'."""

    def __init__(self, model: str, replica: str) -> None:
        self.registry = CollectorRegistry()
        self._process = (model, replica)
        self.engine = EngineStats()
        self.ranks: Sequence[RankStats] = ()
        self.pressures: Mapping[str, float] = {}  # by reason
        self.load_seconds = 0.0
        self.start = StartTimes()
        self.num_restarts = 0
        self.num_repairs = 0
        self.repair = RepairTimes()
        self.expert_imbalance = 1.0
        self.num_rebalances = 0
        names = [metric.name for metric in BY_OWNER["replica"] if metric.kind == "histogram"]
        self._instruments = Instruments(self.registry, "replica", names, self._process)
        self.registry.register(Snapshot("replica", lambda: [(self._process, self._engine_values())]))
        self.registry.register(Snapshot("rank", self._rank_values))

    def step(self, stats: StepStats) -> None:
        observe = self._instruments.observe
        observe("vllm:iteration_tokens_total", stats.num_tokens)
        observe("qwen_ray_step_sequences", stats.num_sequences)
        observe("qwen_ray_step_seconds", stats.step_seconds)
        observe("qwen_ray_step_schedule_seconds", stats.schedule_seconds)
        observe("qwen_ray_step_transport_seconds", max(0.0, stats.step_seconds - stats.rank_seconds))

    def finished(self, times: RequestTimes) -> None:
        if not times.first_scheduled:  # ended in the queue
            return
        observe = self._instruments.observe
        observe("vllm:request_queue_time_seconds", times.first_scheduled - times.arrival)
        observe("vllm:request_inference_time_seconds", times.finished - times.first_scheduled)
        if times.first_token:
            observe("vllm:request_prefill_time_seconds", times.first_token - times.first_scheduled)
            observe("vllm:request_decode_time_seconds", times.finished - times.first_token)

    def _engine_values(self) -> Values:
        engine = self.engine
        return {
            "vllm:num_requests_running": engine.num_running,
            "vllm:num_requests_waiting": engine.num_waiting,
            "vllm:kv_cache_usage_perc": engine.kv_usage,
            "vllm:prefix_cache_queries_total": engine.prefix_queries_total,
            "vllm:prefix_cache_hits_total": engine.prefix_hits_total,
            "vllm:num_preemptions_total": engine.preemptions_total,
            "vllm:cache_config_info": {(str(engine.block_size), str(engine.num_blocks)): 1.0},
            "qwen_ray_sequences_set_aside": engine.num_set_aside,
            "qwen_ray_ended_early_total": {
                ("refused",): engine.refused_total,
                ("overdue",): engine.overdue_total,
                ("poisonous",): engine.poisonous_total,
            },
            "qwen_ray_waiting_tokens": engine.num_waiting_tokens,
            "qwen_ray_kv_blocks": {
                ("total",): engine.num_blocks,
                ("used",): engine.num_used_blocks,
                ("cached",): engine.num_cached_blocks,
            },
            "qwen_ray_computed_prompt_tokens_total": engine.prompt_tokens_total,
            "qwen_ray_sampled_tokens_total": engine.output_tokens_total,
            "qwen_ray_steps_total": engine.steps_total,
            "qwen_ray_load_seconds": self.load_seconds,
            "qwen_ray_start_seconds": {(phase,): seconds for phase, seconds in asdict(self.start).items()},
            "qwen_ray_autoscaling_pressure": {(reason,): value for reason, value in self.pressures.items()},
            "qwen_ray_replica_restarts_total": self.num_restarts,
            "qwen_ray_rank_repairs_total": self.num_repairs,
            "qwen_ray_repair_seconds": {(phase,): seconds for phase, seconds in asdict(self.repair).items()},
            **self._expert_values(),
        }

    def _expert_values(self) -> Values:
        load = ExpertLoad.of(self.ranks)
        if not load.by_expert:
            return {}
        first = min(rank.first_layer for rank in self.ranks)  # not 0 when a stage's ranks did not answer
        layers = enumerate(load.by_expert, start=first)
        tokens = {(str(i), str(e)): float(n) for i, layer in layers for e, n in enumerate(layer)}
        return {
            "qwen_ray_expert_tokens_total": tokens,
            "qwen_ray_expert_imbalance": self.expert_imbalance,
            "qwen_ray_expert_rebalances_total": self.num_rebalances,
        }

    def _rank_values(self) -> Iterable[tuple[Sequence[str], Values]]:
        for rank in self.ranks:
            experts = {
                "qwen_ray_rank_expert_tokens_total": sum(map(sum, rank.expert_tokens)),
                "qwen_ray_rank_moved_experts_total": rank.num_moved_experts,
            }
            yield (
                (
                    *self._process,
                    *map(str, (rank.rank, rank.stage, rank.dp_rank, rank.tp_rank, rank.ep_rank)),
                ),
                {
                    "qwen_ray_rank_steps_total": rank.num_steps,
                    "qwen_ray_rank_tokens_total": rank.num_tokens,
                    "qwen_ray_rank_step_seconds_total": rank.step_seconds,
                    "qwen_ray_rank_memory_bytes": rank.memory_bytes,
                    "qwen_ray_rank_weights_bytes": rank.weights_bytes,
                    "qwen_ray_rank_kv_bytes": rank.kv_bytes,
                    "qwen_ray_rank_read_bytes": rank.bytes_read,
                    "qwen_ray_rank_load_seconds": rank.load_seconds,
                    "qwen_ray_rank_loads_total": rank.num_loads,
                    **(experts if rank.expert_tokens else {}),
                },
            )
