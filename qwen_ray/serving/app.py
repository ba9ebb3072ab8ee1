"""`build(settings)`: the one place where all parts meet. Also what a Serve config names as its import path.

    qwen_ray.serving.app:build      with the settings file's content as `args`

Everything that can be refused is refused here, before anything is allocated.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from qwen_ray.cluster.inventory import hardware
from qwen_ray.config import ModelSettings, Settings
from qwen_ray.core.errors import SettingsError
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.planner.search import plan
from qwen_ray.serving.generation import Model
from qwen_ray.serving.ingress import Ingress
from qwen_ray.serving.replica import Replica
from qwen_ray.sizing import plan_request
from qwen_ray.source.config_file import load_config
from qwen_ray.source.purpose import load_purpose
from qwen_ray.source.resolve import resolve

APP = "qwen-ray"

# Tokens of presence in Ray's count of CPUs, as for ranks: how cores are shared is the planner's arithmetic.
DEPLOYMENT_CPUS = 0.1
MAX_ONGOING_REQUESTS = 10_000  # Serve does not limit; the engine's queue does, with 429
CLOSE_SECONDS = 10.0  # beyond draining: for ranks to end
NODE_POLL_SECONDS = 2.0


def build(settings: Settings | dict[str, Any]) -> serve.Application:
    """The Serve application for `settings`. Ray must be up; `source` may be fetched here, on this node.

    Raises SettingsError, SourceError, CheckpointError, PlanRefused.
    """
    settings = settings if isinstance(settings, Settings) else Settings.from_dict(settings)
    if settings.http.ssl_certfile is not None:
        raise SettingsError(
            "http.ssl_certfile: an application has no say in its proxy. `qwen-ray serve` alone on its machine speaks "
            "TLS; on a cluster, let the gateway or ingress before it do so.",
            field="http.ssl_certfile",
        )
    model = _one_model(settings)
    spec = replica_spec(settings)
    has_room = has_room_for_one_more(settings, spec)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=settings.http.num_ingress,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": DEPLOYMENT_CPUS},
        health_check_period_s=2,
        # Streams go on until they end: in an update beside the new ingress, which comes first.
        graceful_shutdown_timeout_s=settings.http.drain_timeout + CLOSE_SECONDS,
        max_surge_percent=100,
        logging_config={"enable_access_log": False},  # `request_log.py` has a line for each, which says more
    )(Ingress)
    replica = serve.deployment(
        name="Replica",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": DEPLOYMENT_CPUS},
        autoscaling_config=autoscaling_config(model),
        health_check_period_s=2,
        health_check_timeout_s=20,  # three in a row, and it is replaced; ingresses have long gone elsewhere
        # No request goes through Serve's handles, so there is none to wait for: the replica drains itself.
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.http.drain_timeout + CLOSE_SECONDS,
        # An update starts the new one first, one at a time, and then stops an old one; where there is no room for
        # both, the old one goes first, and requests wait.
        max_surge_percent=max(1, 100 // model.replicas.max) if has_room else 0,
        max_constructor_retry_count=1,  # what can pass is tried again in there; the rest would only fail later
    )(Replica)
    replicas = replica.bind(spec, APP, settings.http.drain_timeout)
    return ingress.bind(settings, served_model(model, spec), spec, APP, not has_room, replicas)


def replica_spec(settings: Settings) -> ReplicaSpec:
    """What every replica of the one model is told, planned for the cluster that Ray is connected to.

    With `node_timeout` as soon as the fewest replicas fit: on Kubernetes the application comes before the nodes.
    """
    model = _one_model(settings)
    path = resolve(model.source, settings.cache_dir, revision=model.revision)
    config = load_purpose(path, model.task).applied(load_config(path))
    num_copies = model.replicas.min if settings.node_timeout else model.replicas.max
    deadline = time.monotonic() + settings.node_timeout
    while True:
        found = hardware()
        is_last = time.monotonic() >= deadline
        if found.nodes or is_last:
            report = plan(plan_request(settings, model, config, found, dp=num_copies))
            if report.chosen or is_last:
                spec = report.require().replica_spec(name=model.name, path=str(path), load_format=model.load_format)
                return replace(spec, logs=settings.observability.logs)
        time.sleep(NODE_POLL_SECONDS)


def has_room_for_one_more(settings: Settings, spec: ReplicaSpec) -> bool:
    """Whether the cluster could hold a replica beside those that are asked for."""
    model = _one_model(settings)
    request = plan_request(settings, model, spec.config, hardware(), dp=model.replicas.max + 1)
    as_it_is = replace(
        request,
        tp=spec.plan.tp,
        pp=spec.plan.pp,
        ep=spec.plan.ep,
        dp_attention=spec.plan.dp_attention,
        num_blocks=spec.engine.num_blocks,
        max_model_len=spec.engine.max_model_len,
    )
    return plan(as_it_is).chosen is not None


def served_model(model: ModelSettings, spec: ReplicaSpec) -> Model:
    described = f"{spec.path} {spec.dtype} {spec.quantization} {spec.deterministic} {spec.plan} {spec.engine}"
    purpose = load_purpose(Path(spec.path), model.task)
    return Model(
        name=spec.name,
        source=model.source,
        created=int(time.time()),
        fingerprint=f"fp_{hashlib.sha256(described.encode()).hexdigest()[:10]}",
        vocab_size=spec.config.vocab_size,
        max_model_len=spec.engine.max_model_len,
        eos_token_ids=spec.config.eos_token_ids,
        task=purpose.task,
        embedding=purpose.embedding,
        hidden_size=spec.config.hidden_size,
    )


def autoscaling_config(model: ModelSettings) -> dict[str, Any]:
    """Serve's autoscaling with our policy. Up after 10 s of need, down after 5 minutes without."""
    return {
        "min_replicas": model.replicas.min,
        "max_replicas": model.replicas.max,
        "initial_replicas": model.replicas.min,
        "policy": {"policy_function": "qwen_ray.serving.autoscaling:decide"},
        "metrics_interval_s": 1.0,
        "look_back_period_s": 5.0,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 300.0,
    }


def _one_model(settings: Settings) -> ModelSettings:
    model, *others = settings.models
    if others:
        names = ", ".join(model.name for model in settings.models)
        raise SettingsError(
            f"models: one model is served for now, got {len(settings.models)}: {names}.", field="models"
        )
    return model
