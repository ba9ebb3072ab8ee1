"""Rules and configuration as Prometheus' own tools see them; every alert fires when it should, and only then."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from prometheus_tools import OBSERVABILITY, RULES, checked

PROMETHEUS = OBSERVABILITY / "prometheus"
GROUPS = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
SEVERITIES = {"critical", "warning"}


@dataclass(frozen=True)
class Case:
    """Series by `step` minutes, in promtool's notation; when to look; labels and summary of the alert that fires."""

    alert: str
    fires: dict[str, str]
    quiet: dict[str, str]
    at: str
    summary: str
    labels: str = "m"  # or a replica
    also: tuple[tuple[str, str], ...] = ()  # other labels of the alert
    step: int = 1


def http(status: str, values: str) -> dict[str, str]:
    return {f'qwen_ray_http_requests_total{{{INGRESS},route="/v1/completions",status="{status}"}}': values}


INGRESS = 'model_name="m",ingress="i"'
REPLICA = 'model_name="m",replica="r"'
TTFT = "vllm:time_to_first_token_seconds_bucket"
QUEUE = "vllm:request_queue_time_seconds_bucket"


def ended(reason: str, values: str) -> dict[str, str]:
    return {f'vllm:request_success_total{{{INGRESS},finished_reason="{reason}"}}': values}


def early(why: str, values: str) -> dict[str, str]:
    return {f'qwen_ray_ended_early_total{{{REPLICA},why="{why}"}}': values}


def slow(name: str, process: str, fast: str, all_of_them: str) -> dict[str, str]:
    """A histogram of two buckets: up to 10 s, and up to 20 s."""
    return {
        f'{name}{{{process},le="10.0"}}': fast,
        f'{name}{{{process},le="20.0"}}': all_of_them,
        f'{name}{{{process},le="+Inf"}}': all_of_them,
    }


CASES = [
    Case(
        "QwenRayErrorBudgetBurnFast",
        http("200", "0+98x90") | http("503", "0+2x90"),
        # Of an hour ago, and over; what clients ask for wrongly is theirs.
        http("200", "0+98x150") | http("503", "0+2x60 120x90") | http("400", "0+50x150"),
        "80m",
        "m: 2% of requests fail",
    ),
    Case(
        "QwenRayErrorBudgetBurn",
        ended("stop", "0+99x100") | ended("error", "0+1x100"),
        ended("stop", "0+999x100") | ended("error", "0+1x100"),
        "420m",
        "m: 1% of requests fail",
        step=5,
    ),
    Case(
        "QwenRayErrorBudgetBurnSlow",
        http("200", "0+996x60") | http("500", "0+4x60"),
        http("200", "0+9995x60") | http("500", "0+5x60") | ended("stop", "0+1x60"),
        "1620m",
        "m: 0.4% of requests fail, for days",
        step=30,
    ),
    Case(
        "QwenRaySlowFirstToken",
        slow(TTFT, INGRESS, "0+50x40", "0+100x40"),
        slow(TTFT, INGRESS, "0+99x40", "0+100x40"),
        "30m",
        "m: the first token takes 19s",
    ),
    Case(
        "QwenRayNoReplicaReady",
        {
            f'qwen_ray_replicas{{{INGRESS},state="ready"}}': "1 1 0x20",
            f'qwen_ray_replicas{{{INGRESS},state="repairing"}}': "0x20",
            f'qwen_ray_replicas{{{INGRESS},state="loading"}}': "0 0 1x20",
        },
        {  # a repair is none: requests wait for seconds
            f'qwen_ray_replicas{{{INGRESS},state="ready"}}': "1 1 0x20",
            f'qwen_ray_replicas{{{INGRESS},state="repairing"}}': "0 0 1x20",
        },
        "10m",
        "m: no replica can take requests",
    ),
    Case(
        "QwenRayRequestsWaitForReplica",
        {f"qwen_ray_unplaced_sequences{{{INGRESS}}}": "3x20"},
        {f"qwen_ray_unplaced_sequences{{{INGRESS}}}": "3 0 3 0 3 0 3 0 3 0 3 0"},
        "10m",
        "m: 3 sequences wait for a replica",
    ),
    Case(
        "QwenRayScrapeDown",
        {'up{job="qwen-ray",instance="10.0.0.1:8000"}': "1 0x10"},
        {'up{job="qwen-ray",instance="10.0.0.1:8000"}': "1x6 0 1x6"},
        "8m",
        "10.0.0.1:8000 does not answer /metrics",
        labels="",
        also=(("instance", "10.0.0.1:8000"), ("job", "qwen-ray")),
    ),
    Case(
        "QwenRayNoMetrics",
        {"up": "1x20"},
        {f'qwen_ray_replicas{{{INGRESS},state="ready"}}': "1x20"},
        "10m",
        "There are no metrics of qwen-ray",
        labels="",
    ),
    Case(
        "QwenRayQueueStuck",
        {f"vllm:num_requests_waiting{{{REPLICA}}}": "4x20", f"qwen_ray_steps_total{{{REPLICA}}}": "50x20"},
        {f"vllm:num_requests_waiting{{{REPLICA}}}": "4x20", f"qwen_ray_steps_total{{{REPLICA}}}": "50+1x20"},
        "10m",
        "r: 4 sequences wait, and no step is run",
        labels="r",
    ),
    Case(
        "QwenRayQueueTooLong",
        slow(QUEUE, REPLICA, "0+50x40", "0+100x40"),
        slow(QUEUE, REPLICA, "0+99x40", "0+100x40"),
        "30m",
        "m: sequences wait 19s for room in a batch",
    ),
    Case(
        "QwenRayRequestsRefused",
        early("refused", "0+60x20"),
        early("refused", "7x20") | early("overdue", "0+60x20"),
        "15m",
        "m: 1 sequences a second are refused",
    ),
    Case(
        "QwenRayAtMaximum",
        {
            f'qwen_ray_autoscaling_replicas{{{INGRESS},which="asked"}}': "5x40",
            f'qwen_ray_autoscaling_replicas{{{INGRESS},which="max"}}': "4x40",
        },
        {
            f'qwen_ray_autoscaling_replicas{{{INGRESS},which="asked"}}': "4x40",
            f'qwen_ray_autoscaling_replicas{{{INGRESS},which="max"}}': "4x40",
        },
        "30m",
        "m: 5 replicas are asked for, more than --max-replicas",
    ),
    Case(
        "QwenRayKvCacheFull",
        {f"vllm:kv_cache_usage_perc{{{REPLICA}}}": "0.98x40", f"vllm:num_preemptions_total{{{REPLICA}}}": "0+1x40"},
        # Full and nobody is put back: well used.
        {f"vllm:kv_cache_usage_perc{{{REPLICA}}}": "0.98x40", f"vllm:num_preemptions_total{{{REPLICA}}}": "9x40"},
        "30m",
        "r: the KV cache is 98% full, and sequences are put back",
        labels="r",
    ),
    Case(
        "QwenRayRepairsRepeated",
        {f"qwen_ray_rank_repairs_total{{{REPLICA}}}": "0x9 1x9 2x9 3x60"},
        {f"qwen_ray_rank_repairs_total{{{REPLICA}}}": "0x9 1x60"},
        "60m",
        "r: ranks were replaced 3 times in an hour",
        labels="r",
    ),
    Case(
        "QwenRayReplicaRestarted",
        {f"qwen_ray_replica_restarts_total{{{REPLICA}}}": "0x19 1x9"},
        {f"qwen_ray_replica_restarts_total{{{REPLICA}}}": "1x40"},
        "25m",
        "r: all ranks were started anew",
        labels="r",
    ),
    Case(
        "QwenRayHandOvers",
        {f"qwen_ray_hand_overs_total{{{INGRESS}}}": "0x9 30x30"},
        {f"qwen_ray_hand_overs_total{{{INGRESS}}}": "0x9 2x30"},
        "15m",
        "m: 30 sequences changed their replica in 15 minutes",
    ),
    Case(
        "QwenRayPoisonousRequests",
        early("poisonous", "0x9 1x60"),
        early("poisonous", "1x60"),
        "60m",
        "m: 1 requests were ended because ranks died under them alone",
    ),
    Case(
        "QwenRayExpertImbalance",
        {f"qwen_ray_expert_imbalance{{{REPLICA}}}": "1.75x60"},
        {f"qwen_ray_expert_imbalance{{{REPLICA}}}": "1.75x20 1.2x40"},
        "45m",
        "r: the fullest expert rank has 1.75 times the mean's tokens",
        labels="r",
    ),
    Case(
        "QwenRayStartTooLong",
        {f'qwen_ray_replicas{{{INGRESS},state="loading"}}': "2x40"},
        {f'qwen_ray_replicas{{{INGRESS},state="loading"}}': "2x15 0x25"},
        "30m",
        "m: 2 replicas have been loading for 20 minutes",
        also=(("state", "loading"),),
    ),
]


def labels_of(case: Case) -> dict[str, str]:
    own: dict[str, dict[str, str]] = {"": {}, "m": {"model_name": "m"}, "r": {"model_name": "m", "replica": "r"}}
    return {"severity": ALERTS[case.alert]["labels"]["severity"], **own[case.labels], **dict(case.also)}


def unit_test(case: Case, *, fires: bool) -> dict[str, Any]:
    annotations = {**ALERTS[case.alert]["annotations"], "summary": case.summary}
    alerts = [{"exp_labels": labels_of(case), "exp_annotations": annotations}] if fires else []
    series = case.fires if fires else case.quiet
    return {
        "name": f"{case.alert} {'fires' if fires else 'is quiet'}",
        "interval": f"{case.step}m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": alerts}],
    }


def run_unit_tests(folder: Path, tests: list[dict[str, Any]], step: int = 1) -> None:
    file = folder / "tests.yaml"
    whole = {
        "rule_files": [str(path) for path in RULES],
        "evaluation_interval": f"{step}m",
        "group_eval_order": [group["name"] for group in sorted(GROUPS, key=lambda group: "alerts" in group["name"])],
        "tests": tests,
    }
    file.write_text(yaml.safe_dump(whole, sort_keys=False))
    checked("promtool", "test", "rules", file)


def test_every_alert_fires_and_is_quiet(tmp_path: Path) -> None:
    assert sorted(case.alert for case in CASES) == sorted(ALERTS)
    for step in {case.step for case in CASES}:
        cases = [case for case in CASES if case.step == step]
        run_unit_tests(tmp_path, [unit_test(case, fires=fires) for case in cases for fires in (True, False)], step)


def test_a_series_that_several_targets_show_counts_once(tmp_path: Path) -> None:
    """Two ingresses, both seen by the scrapes of two pods, and two replicas."""
    series: dict[str, str] = {}
    for pod in "ab":
        for ingress in "ij":
            of = f'pod="{pod}",instance="{pod}:8000",model_name="m",ingress="{ingress}"'
            series[f"vllm:generation_tokens_total{{{of}}}"] = "0+600x20"
            series[f'qwen_ray_replicas{{{of},state="ready"}}'] = "2x20"
            series[f"qwen_ray_price_per_hour{{{of}}}"] = "3.6x20"
            for le in ("1.0", "2.0", "+Inf"):
                series[f'vllm:e2e_request_latency_seconds_bucket{{{of},le="{le}"}}'] = (
                    "0+50x20" if le == "1.0" else "0+100x20"
                )
        for replica in "rs":
            of = f'pod="{pod}",instance="{pod}:8000",model_name="m",replica="{replica}"'
            series[f"vllm:num_requests_waiting{{{of}}}"] = "3x20"
            series[f'qwen_ray_rank_memory_bytes{{{of},rank="0",stage="0"}}'] = "1x20"
    expected = {
        "qwen_ray:generation_tokens:rate5m": 20,
        'qwen_ray:replicas{state="ready"}': 2,
        "qwen_ray:waiting": 6,
        "qwen_ray:ranks": 2,
        "qwen_ray:generation_tokens_per_rank:rate5m": 10,
        "qwen_ray:e2e_seconds:p50": 1,
        "qwen_ray:price_per_hour": 7.2,
        "qwen_ray:price_per_million_generated_tokens": 100,
    }
    checks = [
        {
            "expr": f"round({name}, 1e-6)",
            "eval_time": "15m",
            "exp_samples": [
                {"labels": '{model_name="m", state="ready"}' if "state" in name else '{model_name="m"}', "value": value}
            ],
        }
        for name, value in expected.items()
    ]
    rows = [{"series": name, "values": values} for name, values in series.items()]
    run_unit_tests(tmp_path, [{"interval": "1m", "input_series": rows, "promql_expr_test": checks}])


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_what_it_is_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in SEVERITIES
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    runbook = OBSERVABILITY.parent / rule["annotations"]["runbook_url"]
    text = runbook.read_text(encoding="utf-8")
    assert name in text
    for heading in ("## What it means", "## What to look at", "## What to do"):
        assert heading in text, runbook


def test_no_runbook_is_left_over() -> None:
    used = {Path(rule["annotations"]["runbook_url"]).name for rule in ALERTS.values()}
    assert {path.name for path in (OBSERVABILITY / "runbooks").iterdir()} == used


def test_rules_and_configurations_pass_the_tools() -> None:
    checked("promtool", "check", "rules", *RULES)
    for name in ("prometheus.yaml", "prometheus-discovery.yaml"):
        checked("promtool", "check", "config", PROMETHEUS / name)
    checked("amtool", "check-config", OBSERVABILITY / "alertmanager" / "alertmanager.yaml")


def pod(**labels: str) -> dict[str, str]:
    """As Kubernetes' discovery describes a container's port of a RayService's pod."""
    return {
        "__meta_kubernetes_namespace": "models",
        "__meta_kubernetes_pod_name": "demo-head",
        "__meta_kubernetes_pod_ready": "true",
        "__meta_kubernetes_pod_container_port_number": "8000",
        "__meta_kubernetes_pod_label_ray_io_cluster": "demo-1",
        "__meta_kubernetes_pod_label_ray_io_serve": "true",
        **{f"__meta_kubernetes_pod_{name}": value for name, value in labels.items()},
    }


def test_pods_that_serve_are_kept_and_no_others(tmp_path: Path) -> None:
    """Debian's Prometheus is built without Kubernetes: its discovery is played by a list of targets."""
    config = yaml.safe_load((PROMETHEUS / "prometheus-kubernetes.yaml").read_text())
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    pods = {
        "10.0.0.1:8000": pod(),
        "10.0.0.2:8000": pod(ready="false"),
        "10.0.0.3:8000": pod(label_ray_io_serve="false"),
        "10.0.0.4:8265": pod(container_port_number="8265"),
    }
    job["static_configs"] = [{"targets": [address], "labels": labels} for address, labels in pods.items()]
    (alertmanager,) = config["alerting"]["alertmanagers"]
    assert alertmanager.pop("kubernetes_sd_configs") == [{"role": "endpoints"}]
    config["rule_files"] = [str(path) for path in RULES]
    file = tmp_path / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    checked("promtool", "check", "config", file)
    found = json.loads(checked("promtool", "check", "service-discovery", file, "qwen-ray"))
    kept = [target["labels"] for target in found if target["labels"]]
    assert [(t["__address__"], t["pod"], t["namespace"], t["ray_cluster"]) for t in kept] == [
        ("10.0.0.1:8000", "demo-head", "models", "demo-1")
    ]
