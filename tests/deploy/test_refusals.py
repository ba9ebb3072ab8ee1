"""Values that the chart refuses, and in what words."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
from charts import CHART, refusal, render


def group(**values: Any) -> dict[str, Any]:
    return {"name": "g", "minReplicas": 1, "maxReplicas": 1, "gpus": 8, **values}


def one(plan: Any = "auto", replicas: tuple[int, int] = (1, 1), **values: Any) -> dict[str, Any]:
    """Values with this model and one group of pods with 8 GPUs, or as given."""
    model = {"name": "m", "source": "Qwen/Qwen3-8B", "plan": plan, "replicas": {"min": replicas[0], "max": replicas[1]}}
    return {"models": [model], "workerGroups": [group()], **values}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a typo at the top": ({"modells": []}, "'modells' not allowed"),
    "a typo in Settings": ({"http": {"prot": 1}}, "'prot' not allowed"),
    "a typo in a model": ({"models": [{"nam": "x"}]}, "'nam' not allowed"),
    "a typo in a plan": (one({"pt": 2}), "'pt' not allowed"),
    "a typo in a group": ({"workerGroups": [group(gpu=1)]}, "'gpu' not allowed"),
    "a typo in monitoring": ({"monitoring": {"serviceMonitor": {"enable": True}}}, "'enable' not allowed"),
    "no model": ({"models": []}, "/models"),
    "no group": ({"workerGroups": []}, "/workerGroups"),
    "latest": ({"image": {"tag": "latest"}}, "/image/tag"),
    "no digest": ({"image": {"digest": "latest"}}, "/image/digest"),
    "no size": ({"engine": {"kv_cache_memory": "1XiB"}}, "/engine/kv_cache_memory"),
    "out of range": ({"engine": {"gpu_memory_utilization": 1.5}}, "/engine/gpu_memory_utilization"),
    "host": ({"http": {"host": "127.0.0.1"}}, "'host' not allowed"),
    "TLS": ({"http": {"ssl_certfile": "/c"}}, "TLS is spoken by what stands in front"),
    "two models": ({"models": [{"name": "a"}, {"name": "b"}]}, "one model is served by a release, got 2"),
    "tp above the pod's GPUs": (
        one({"tp": 16}),
        "a stage has 16 ranks (tp x dp_attention), which must lie in one pod, ",
    ),
    "copies above the pod's GPUs": (one({"tp": 4, "dp_attention": 4}), "a stage has 16 ranks"),
    "experts above the pod's GPUs": (one({"ep": 16}), "a stage has 16 ranks"),
    "tp above the pod's CPUs": (
        one({"tp": 3}, workerGroups=[group(gpus=0, resources={"requests": {"cpu": "2500m"}})]),
        "pods have 2 CPUs",
    ),
    "max above the groups'": (one({"tp": 8}, (1, 2)), "hold 1 at their maxReplicas; raise workerGroups[].maxReplicas"),
    "stages above the groups'": (one({"tp": 8, "pp": 2}), "models[0].replicas.max: 1 replicas of 2 x 8 ranks"),
    "min above the groups'": (
        one({"tp": 8}, (2, 2), workerGroups=[group(maxReplicas=2)]),
        "models[0].replicas.min: 2 replicas of 1 x 8 ranks need 2 stages, but the worker groups hold 1",
    ),
    "auto above the groups'": (one("auto", (1, 9)), "models[0].replicas.max: 9 replicas"),
    "replicas upside down": (one({"tp": 1}, (3, 2)), "models[0].replicas: max (2) must be at least min (3)."),
    "group upside down": ({"workerGroups": [group(minReplicas=2)]}, "maxReplicas (1) must be at least minReplicas (2)"),
    "two of a name": ({"workerGroups": [group(), group()]}, 'two are called "g"'),
    "a claim without a name": ({"weights": {"type": "existingClaim"}}, "weights.existingClaim: weights.type is"),
    "a path that is not used": ({"weights": {"hostPath": "/w"}}, "but weights.type is emptyDir"),
    "Redis without an address": ({"gcsFaultTolerance": {"enabled": True}}, "give its address"),
    "metrics behind a key": (
        {"apiKeys": {"existingSecret": "k"}, "monitoring": {"serviceMonitor": {"enabled": True}}},
        "monitoring.serviceMonitor.keySecret.name: /metrics wants an API key",
    ),
    "keys in two places": (
        {"apiKeys": {"existingSecret": "k"}, "http": {"api_keys_file": "/k"}},
        "apiKeys.existingSecret sets it",
    ),
    "an ingress without a host": ({"ingress": {"enabled": True}}, "ingress.hosts"),
    "a route without a gateway": ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
    "a pool without a picker": ({"inferencePool": {"enabled": True}}, "inferencePool.endpointPicker.name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_clear_sentence(helm: str, name: str) -> None:
    values, words = REFUSED[name]
    assert words in refusal(helm, values)


GRID = [
    (tp, pp, copies, gpus, least, most)
    for tp, pp, copies, gpus, (least, most) in itertools.product(
        (1, 2, 8), (1, 2), (1, 2), (1, 8), ((1, 1), (1, 2), (2, 3))
    )
]


@pytest.mark.parametrize("part", range(6))
def test_taken_exactly_when_every_stage_has_a_pod(helm: str, part: int) -> None:
    """Beside the arithmetic, written once more: two groups, the second only when there is load."""
    for tp, pp, copies, gpus, least, most in GRID[part::6]:
        groups = [group(gpus=gpus, minReplicas=2, maxReplicas=3), group(name="h", gpus=4, minReplicas=0, maxReplicas=1)]
        values = one({"tp": tp, "pp": pp}, (least, most), workerGroups=groups)
        if copies > 1:
            values["models"][0]["plan"]["dp_attention"] = copies
        stage = tp * copies
        fits = stage <= max(gpus, 4)
        fits &= most * pp <= 3 * (gpus // stage) + 4 // stage
        fits &= least * pp <= 2 * (gpus // stage)
        if fits:
            render(helm, values)
        else:
            assert "models[0]." in refusal(helm, values)


def closed_places(schema: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the schema lists its keys: there an unknown one must be refused."""
    if not isinstance(schema, dict):
        return []
    found = [path] if "properties" in schema else []
    for name, below in schema.get("properties", {}).items():
        found += closed_places(below, (*path, name))
    if "items" in schema:
        found += closed_places(schema["items"], (*path, 0))
    for below in schema.get("anyOf", []):
        found += closed_places(below, path)
    return found


SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def test_an_unknown_key_is_refused_wherever_keys_are_listed() -> None:
    from jsonschema import Draft7Validator

    places = closed_places(SCHEMA)
    assert len(places) > 30
    checker = Draft7Validator(SCHEMA)
    for path in places:
        values: Any = {"no_such_key": 1}
        for step in reversed(path):
            values = [copy.deepcopy(values)] if step == 0 else {step: values}
        said = [error.message for error in checker.iter_errors(values)]
        said += [inner.message for error in checker.iter_errors(values) for inner in error.context or ()]
        assert any("no_such_key" in message for message in said), path
