"""Recorders, and what several processes' expositions make when merged."""

from __future__ import annotations

import re
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from qwen_ray.core.stats import EngineStats, RankStats, RequestTimes, ScalingStats, StepStats
from qwen_ray.metrics.catalog import BY_OWNER, PROCESS_LABELS, Owner
from qwen_ray.metrics.exporter import exposition, merge
from qwen_ray.metrics.recorder import IngressRecorder, ReplicaRecorder


def rank(number: int) -> RankStats:
    return RankStats(
        rank=number,
        stage=0,
        tp_rank=number,
        pid=1,
        node="n",
        device="cpu",
        num_steps=7,
        ep_rank=number,
        first_layer=3,
        expert_tokens=((1 + number, 4), ()),
        num_moved_experts=2,
    )


def replica(name: str) -> ReplicaRecorder:
    recorder = ReplicaRecorder("m", name)
    recorder.ranks = [rank(0), rank(1)]
    recorder.pressures = {"backlog": 0.5, "kv_cache": 0.0}
    recorder.engine = EngineStats(num_running=3, num_blocks=10, num_used_blocks=5, block_size=16)
    return recorder


def values(text: str, sample: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {
        tuple(sorted(found.labels.items())): found.value
        for family in text_string_to_metric_families(text)
        for found in family.samples
        if found.name == sample
    }


def test_every_name_of_the_catalog_is_exported_once_with_its_labels() -> None:
    ingress = IngressRecorder("m", "i", price_per_hour=2.0)
    ingress.scaling = ScalingStats(target=2, asked=1, min=1, max=4, decisions={("up", "backlog"): 1})
    ingress.http_request("/v1/models", 200)
    text = merge([exposition(ingress.registry), exposition(replica("a").registry), exposition(replica("b").registry)])
    assert len(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) == len(
        set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    )
    families = {family.name: family for family in text_string_to_metric_families(text)}
    owners: list[Owner] = ["ingress", "replica", "rank"]
    for owner in owners:
        for row in BY_OWNER[owner]:
            family = families.pop(row.name.removesuffix("_total") if row.kind == "counter" else row.name)
            assert family.type == row.kind, row.name
            assert family.documentation == row.help
            assert family.samples, row.name
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == {*PROCESS_LABELS[owner], *row.labels}, row.name
    assert families == {}


def test_numbers_of_an_engine_and_its_ranks() -> None:
    text = exposition(replica("a").registry)
    assert list(values(text, "vllm:num_requests_running").values()) == [3]
    assert list(values(text, "vllm:kv_cache_usage_perc").values()) == [0.5]
    assert len(values(text, "qwen_ray_rank_steps_total")) == 2


def test_experts_by_layer() -> None:
    found = values(exposition(replica("a").registry), "qwen_ray_expert_tokens_total")
    by_expert = {(dict(labels)["layer"], dict(labels)["expert"]): count for labels, count in found.items()}
    assert by_expert == {("3", "0"): 3, ("3", "1"): 8}


def test_a_dense_model_says_nothing_of_experts() -> None:
    recorder = replica("a")
    recorder.ranks = [replace(rank(0), expert_tokens=())]
    assert "expert_imbalance" not in exposition(recorder.registry)
    assert 'qwen_ray_rank_expert_tokens_total{dp_rank="0"' not in exposition(recorder.registry)


def test_steps_and_times_of_a_replica() -> None:
    recorder = replica("a")
    recorder.step(
        StepStats(
            num_sequences=2,
            num_tokens=5,
            num_output_tokens=1,
            schedule_seconds=0.001,
            step_seconds=0.5,
            rank_seconds=0.4,
        )
    )
    times = RequestTimes(
        arrival=10,
        first_scheduled=11,
        first_token=13,
        finished=20,
        num_prompt_tokens=4,
        num_output_tokens=3,
        finish_reason="stop",
    )
    recorder.finished(times)
    text = exposition(recorder.registry)
    for name, expected in {
        "qwen_ray_step_seconds_sum": 0.5,
        "qwen_ray_step_transport_seconds_sum": 0.1,
        "vllm:iteration_tokens_total_sum": 5,
        "vllm:request_queue_time_seconds_sum": 1,
        "vllm:request_prefill_time_seconds_sum": 2,
        "vllm:request_decode_time_seconds_sum": 7,
        "vllm:request_inference_time_seconds_sum": 9,
    }.items():
        (value,) = values(text, name).values()
        assert abs(value - expected) < 1e-9, name


def test_a_sequence_that_ended_in_the_queue_has_no_times() -> None:
    recorder = replica("a")
    recorder.finished(
        RequestTimes(
            arrival=10,
            first_scheduled=0,
            first_token=0,
            finished=20,
            num_prompt_tokens=4,
            num_output_tokens=0,
            finish_reason="abort",
        )
    )
    assert list(values(exposition(recorder.registry), "vllm:request_queue_time_seconds_count").values()) == [0]


def test_sequences_as_an_ingress_sees_them() -> None:
    recorder = IngressRecorder("m", "i")
    recorder.first_tokens(0.25, num_prompt_tokens=4, num_tokens=1)
    recorder.next_tokens(0.5, num_tokens=2)
    recorder.finished(
        RequestTimes(
            arrival=10,
            first_scheduled=10.5,
            first_token=11,
            finished=13,
            num_prompt_tokens=4,
            num_output_tokens=3,
            finish_reason="length",
        )
    )
    text = exposition(recorder.registry)
    assert list(values(text, "vllm:inter_token_latency_seconds_count").values()) == [2]
    assert list(values(text, "vllm:inter_token_latency_seconds_sum").values()) == [0.5]
    assert list(values(text, "vllm:generation_tokens_total").values()) == [3]
    assert list(values(text, "vllm:request_time_per_output_token_seconds_sum").values()) == [1]
    reasons = {
        dict(labels)["finished_reason"]: value for labels, value in values(text, "vllm:request_success_total").items()
    }
    assert reasons == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_merging_nothing() -> None:
    assert merge(["", ""]) == "\n"


def test_names_that_gateways_scalers_and_dashboards_made_for_vllm_ask_for() -> None:
    histograms = [
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens"),
        *(f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode", "inference")),
    ]
    gauges = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"]
    counters = [
        *("prompt_tokens_total", "generation_tokens_total", "request_success_total", "num_preemptions_total"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total"),
    ]
    rows = {row.name: row for rows in BY_OWNER.values() for row in rows}
    for kind, names in (("histogram", histograms), ("gauge", gauges), ("counter", counters)):
        for name in names:
            assert rows[f"vllm:{name}"].kind == kind
    assert rows["vllm:request_success_total"].labels == ("finished_reason",)
    assert rows["vllm:cache_config_info"].labels == ("block_size", "num_gpu_blocks")
    assert all("model_name" in labels for labels in PROCESS_LABELS.values())
