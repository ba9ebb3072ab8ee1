"""How the application is put together: what Serve is told about updates and endings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.config import Settings
from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.hardware import GIB, Hardware, Node, cpu_device

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own, while it is imported
    from qwen_ray.serving import app


@pytest.fixture
def model(tmp_path: Path) -> str:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 260,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
        "eos_token_id": 257,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(device=cpu_device(num_cores=4, memory_bytes=8 * GIB), num_devices=1, num_cores=4)
    monkeypatch.setattr(app, "hardware", lambda: Hardware(nodes=(node,)))


def settings(model: str, **replicas: int) -> Settings:
    wanted = {"source": model, "load_format": "dummy", "replicas": {"min": 1, "max": 1, **replicas}}
    return Settings.from_dict({"models": [wanted], "engine": {"kv_cache_memory": "1GiB"}})


@pytest.mark.parametrize(("maximum", "has_room"), [(1, True), (3, True), (5, False)])
def test_room_is_for_as_many_as_fit(model: str, maximum: int, has_room: bool) -> None:
    asked = settings(model, max=maximum)
    assert app.has_room_for_one_more(asked, app.replica_spec(asked)) is has_room


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
@pytest.mark.parametrize(("maximum", "surge"), [(1, 100), (3, 33), (5, 0)])
def test_an_update_starts_one_new_replica_first_where_there_is_room(model: str, maximum: int, surge: int) -> None:
    ingress: Any = app.build(settings(model, max=maximum))._bound_deployment
    replica: Any = next(a for a in ingress.init_args if hasattr(a, "_bound_deployment"))._bound_deployment
    assert replica._deployment_config.max_surge_percent == surge
    assert ingress._deployment_config.max_surge_percent == 100
    assert ingress.init_args[4] is (surge == 0)
    for deployment in (ingress, replica):
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 610


def test_what_decides_tokens_is_in_the_fingerprint(model: str) -> None:
    spec = app.replica_spec(settings(model))
    assert app.replica_spec(settings(model, max=2)).fingerprint == spec.fingerprint
    other = Settings.from_dict({"models": [{"source": model, "load_format": "dummy", "max_model_len": 256}]})
    assert app.replica_spec(other).fingerprint != spec.fingerprint


def test_with_a_node_timeout_it_waits_for_nodes_and_plans_for_the_fewest(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(device=cpu_device(num_cores=4, memory_bytes=8 * GIB), num_devices=1, num_cores=4)
    joining = iter([Hardware(nodes=()), Hardware(nodes=()), Hardware(nodes=(node,))])
    monkeypatch.setattr(app, "hardware", lambda: next(joining))
    monkeypatch.setattr(app, "NODE_POLL_SECONDS", 0.0)
    asked = settings(model, max=50)  # of which one fits
    spec = app.replica_spec(asked.model_copy(update={"node_timeout": 60.0}))
    assert spec.plan.world_size == 1
    assert next(joining, None) is None


def test_it_waits_no_longer_than_that_and_not_at_all_by_default(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(app, "hardware", lambda: asked.append(app.time.monotonic()) or Hardware(nodes=()))
    monkeypatch.setattr(app, "NODE_POLL_SECONDS", 0.02)
    with pytest.raises(PlanRefused):
        app.replica_spec(settings(model))
    assert len(asked) == 1
    with pytest.raises(PlanRefused):
        app.replica_spec(settings(model).model_copy(update={"node_timeout": 0.2}))
    assert len(asked) > 2
