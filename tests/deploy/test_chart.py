"""What the chart renders: objects that an API server takes, and that fit each other."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts import CHART, READY, ROOT, check, of_kind, pod_templates, render, serve_config

from qwen_ray.config import Settings
from qwen_ray.serving.environment import ENVIRONMENT, KEEP_ALIVE_SECONDS

EVERYTHING: dict[str, Any] = {
    "models": [{"name": "m", "source": "Qwen/Qwen3-8B", "plan": {"tp": 2, "pp": 2}, "replicas": {"min": 1, "max": 4}}],
    "http": {"drain_timeout": 100, "num_ingress": 2, "max_body_bytes": "16MiB"},
    "engine": {"kv_cache_memory": "4GiB", "max_num_batched_tokens": "8k"},
    "observability": {"log_level": "debug"},
    "image": {
        "repository": "registry.example.com/qwen-ray",
        "digest": f"sha256:{'0' * 64}",
        "pullSecrets": [{"name": "registry"}],
    },
    "head": {
        "priorityClassName": "high",
        "nodeSelector": {"disk": "ssd"},
        "labels": {"team": "a"},
        "annotations": {"b": "c"},
        "env": [{"name": "RAY_LOG_TO_STDERR", "value": "1"}],
    },
    "workerGroups": [
        {
            "name": "a",
            "minReplicas": 1,
            "maxReplicas": 2,
            "gpus": 4,
            "runtimeClassName": "nvidia",
            "priorityClassName": "high",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
            ],
            "resources": {"requests": {"cpu": 8, "memory": "64Gi"}, "limits": {"memory": "64Gi"}},
            "shmSize": "8Gi",
        },
        {"name": "b", "minReplicas": 0, "maxReplicas": 4, "gpus": 2, "gpuResource": "nvidia.com/mig-3g.40gb"},
    ],
    "weights": {"type": "pvc", "storageClassName": "fast", "size": "1Ti"},
    "huggingFace": {"existingSecret": "hf"},
    "apiKeys": {"existingSecret": "keys"},
    "gcsFaultTolerance": {
        "enabled": True,
        "redisAddress": "redis://redis:6379",
        "passwordSecret": {"name": "redis", "key": "p"},
        "externalStorageNamespace": "x",
    },
    "serviceAccountName": "models",
    "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    "extraEnvFrom": [{"configMapRef": {"name": "more"}}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "extraObjects": [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "{{ .Release.Name }}-x"}, "stringData": {"a": "b"}}
    ],
    "networkPolicy": {
        "allowFrom": [{"namespaceSelector": {"matchLabels": {"gateway": "yes"}}}],
        "allowMetricsFrom": [{"namespaceSelector": {"matchLabels": {"monitoring": "yes"}}}],
    },
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "p"}, "keySecret": {"name": "scrape"}},
        "podMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True, "annotations": {"folder": "qwen-ray"}},
    },
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "hosts": ["qwen.example.com"],
        "tls": [{"hosts": ["qwen.example.com"], "secretName": "tls"}],
    },
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["qwen.example.com"]},
    "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
}


def test_lint_is_content(helm: str) -> None:
    for ready in READY:
        command = [helm, "lint", "--strict", str(CHART), "-f", str(CHART / f"values-{ready}.yaml")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("ready", [None, *READY])
def test_an_api_server_takes_every_object(helm: str, ready: str | None) -> None:
    check(render(helm, ready=ready))


def test_an_api_server_takes_everything_at_once(helm: str) -> None:
    objects = render(helm, EVERYTHING)
    check(objects)
    kinds = {one["kind"] for one in objects}
    assert kinds >= {"RayService", "ConfigMap", "PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy", "Pod"}
    assert kinds >= {"Service", "ServiceMonitor", "PodMonitor", "Ingress", "HTTPRoute", "InferencePool", "Secret"}


def test_the_check_itself_sees_an_unknown_field(helm: str) -> None:
    for kind in ("RayService", "NetworkPolicy"):
        objects = render(helm)
        of_kind(objects, kind)["spec"]["typo"] = 1
        with pytest.raises(Exception, match="typo"):
            check(objects)


@pytest.mark.parametrize("ready", [None, *READY])
def test_serve_and_the_settings_file_are_told_the_same(helm: str, ready: str | None) -> None:
    objects = render(helm, ready=ready)
    config = serve_config(objects)
    (application,) = config["applications"]
    assert application["import_path"] == "qwen_ray.serving.app:build"
    file = yaml.safe_load(of_kind(objects, "ConfigMap")["data"]["settings.yaml"])
    assert application["args"] == file
    settings = Settings.from_dict(file)
    values = yaml.safe_load((CHART / (f"values-{ready}.yaml" if ready else "values.yaml")).read_text())
    assert settings.models == Settings.from_dict({"models": values["models"]}).models
    assert (settings.http.host, settings.node_timeout) == ("0.0.0.0", 1800)
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000, "keep_alive_timeout_s": KEEP_ALIVE_SECONDS}


def test_settings_arrive_as_they_were_written(helm: str) -> None:
    args = serve_config(render(helm, EVERYTHING))["applications"][0]["args"]
    for section in ("models", "engine", "observability"):
        assert args[section] == EVERYTHING[section]
    assert args["http"] == {
        **EVERYTHING["http"],
        "port": 8000,
        "host": "0.0.0.0",
        "api_keys_file": "/etc/qwen-ray/keys/api-keys.yaml",
    }


def test_large_numbers_stay_whole(helm: str) -> None:
    values = {"http": {"max_body_bytes": 123_456_789_012}, "engine": {"max_num_batched_tokens": 2_097_152}}
    args = serve_config(render(helm, values))["applications"][0]["args"]
    assert (args["http"]["max_body_bytes"], args["engine"]["max_num_batched_tokens"]) == (123_456_789_012, 2_097_152)


def test_every_ray_process_has_our_environment(helm: str) -> None:
    for name, pod in pod_templates(render(helm, EVERYTHING)).items():
        for container in (*pod["spec"]["containers"], *pod["spec"]["initContainers"]):
            found = {one["name"]: one.get("value") for one in container["env"]}
            assert {key: found.get(key) for key in ENVIRONMENT} == ENVIRONMENT
            assert found["NCCL_DEBUG"] == "WARN"
            assert ("RAY_LOG_TO_STDERR" in found) == (name == "head")


def test_names_that_the_application_wants(helm: str) -> None:
    source = (ROOT / "qwen_ray" / "serving" / "app.py").read_text()
    assert f'APP = "{serve_config(render(helm))["applications"][0]["name"]}"' in source


def test_ray_is_the_one_of_the_image(helm: str) -> None:
    version = of_kind(render(helm), "RayService")["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_secrets_are_named_never_given(helm: str) -> None:
    objects = render(helm, EVERYTHING)
    assert [one["metadata"]["name"] for one in objects if one["kind"] == "Secret"] == ["qwen-x"]
    worker = pod_templates(objects)["a"]["spec"]
    (token,) = [one for one in worker["containers"][0]["env"] if one["name"] == "HF_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hf", "key": "HF_TOKEN"}}
    assert {"name": "api-keys", "secret": {"secretName": "keys"}} in worker["volumes"]
    redis = of_kind(objects, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert redis["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "p"}}}


@pytest.mark.parametrize("ready", [None, *READY])
def test_pods_are_not_root_and_write_only_where_they_may(helm: str, ready: str | None) -> None:
    for pod in pod_templates(render(helm, ready=ready)).values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in (*pod["spec"]["containers"], *pod["spec"]["initContainers"]):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert not container["image"].endswith(":latest")
            writable = {one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")}
            assert writable == {"/tmp", "/dev/shm", "/weights"}


def test_pods_outlive_their_streams(helm: str) -> None:
    objects = render(helm, {"http": {"drain_timeout": 100}})
    assert of_kind(objects, "RayService")["spec"]["rayClusterDeletionDelaySeconds"] > 100
    worker = pod_templates(objects)["workers"]["spec"]
    command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    seconds = int(command.rpartition("--deadline-remaining-seconds ")[2].split()[0])
    assert seconds > 100
    assert seconds + 30 < worker["terminationGracePeriodSeconds"] + 1


def test_a_worker_is_ready_when_it_answers_and_alive_while_ray_is(helm: str) -> None:
    pods = pod_templates(render(helm, {"http": {"port": 9000}}))
    worker = pods["workers"]["spec"]["containers"][0]
    assert worker["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": 9000}
    for probe in ("startupProbe", "livenessProbe"):
        assert worker[probe]["httpGet"]["path"] == "/api/healthz"
    # KubeRay waits for the head before it deploys: it must not wait for the application.
    assert "readinessProbe" not in pods["head"]["spec"]["containers"][0]


def test_workers_scale_only_where_they_may(helm: str) -> None:
    fixed = of_kind(render(helm), "RayService")["spec"]["rayClusterConfig"]
    assert "enableInTreeAutoscaling" not in fixed
    scaled = of_kind(render(helm, EVERYTHING), "RayService")["spec"]["rayClusterConfig"]
    assert scaled["enableInTreeAutoscaling"] is True
    assert [(g["minReplicas"], g["maxReplicas"]) for g in scaled["workerGroupSpecs"]] == [(1, 2), (0, 4)]
    first, second = (g["template"]["spec"]["containers"][0]["resources"] for g in scaled["workerGroupSpecs"])
    assert first["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 4}
    assert second["requests"] == {"nvidia.com/mig-3g.40gb": 2}


def test_the_outside_reaches_two_ports(helm: str) -> None:
    ours, api, metrics, operator = of_kind(render(helm, EVERYTHING), "NetworkPolicy")["spec"]["ingress"]
    assert "ports" not in ours
    assert set(ours["from"][0]) == {"podSelector"}
    assert [one["port"] for one in api["ports"]] == [8000]
    assert [one["port"] for one in metrics["ports"]] == [8080]
    assert {8265} <= {one["port"] for one in operator["ports"]}
    assert api["from"] == EVERYTHING["networkPolicy"]["allowFrom"]
    assert metrics["from"] == EVERYTHING["networkPolicy"]["allowMetricsFrom"]


@pytest.mark.parametrize(
    ("weights", "volume"),
    [
        ({}, {"emptyDir": {"sizeLimit": "50Gi"}}),
        ({"type": "pvc"}, {"persistentVolumeClaim": {"claimName": "qwen-qwen-ray-weights"}}),
        ({"type": "existingClaim", "existingClaim": "w"}, {"persistentVolumeClaim": {"claimName": "w"}}),
        ({"type": "hostPath", "hostPath": "/w"}, {"hostPath": {"path": "/w", "type": "DirectoryOrCreate"}}),
    ],
)
def test_weights_lie_where_they_are_told(helm: str, weights: dict[str, str], volume: dict[str, Any]) -> None:
    objects = render(helm, {"weights": weights})
    for pod in pod_templates(objects).values():
        assert {"name": "weights", **volume} in pod["spec"]["volumes"]
        (fetch,) = pod["spec"]["initContainers"]
        assert fetch["command"][:2] == ["qwen-ray", "pull"]
    assert any(one["kind"] == "PersistentVolumeClaim" for one in objects) is (weights.get("type") == "pvc")


def test_nothing_is_fetched_when_not_asked_to(helm: str) -> None:
    for pod in pod_templates(render(helm, {"weights": {"prefetch": False}})).values():
        assert "initContainers" not in pod["spec"]


def test_another_model_wants_other_pods_and_nothing_else_does(helm: str) -> None:
    def pods(**model: Any) -> dict[str, Any]:
        return pod_templates(render(helm, {"models": [{"name": "m", "source": "a/b", **model}]}))

    assert pods() == pods(max_model_len="8k", replicas={"min": 1, "max": 1})
    assert pods() != pods(source="a/c")
    assert pods() != pods(revision="main")


def test_switched_off_is_not_there(helm: str) -> None:
    off = {"enabled": False}
    objects = render(helm, {"podDisruptionBudget": off, "networkPolicy": off, "tests": off})
    assert {one["kind"] for one in objects} == {"RayService", "ConfigMap"}


def test_rules_and_dashboards_are_the_files_of_the_chart(helm: str, tmp_path: Path) -> None:
    chart = tmp_path / "qwen-ray"
    subprocess.run(["cp", "-r", str(CHART), str(chart)], check=True)
    for folder in ("rules", "dashboards"):
        (chart / "files" / folder).mkdir(parents=True, exist_ok=True)
        for old in (chart / "files" / folder).iterdir():
            old.unlink()
    monitoring = {"monitoring": {"prometheusRule": {"enabled": True}, "dashboards": {"enabled": True}}}
    assert not {"PrometheusRule"} & {one["kind"] for one in render(helm, monitoring, chart=chart)}
    groups = [
        {"name": "one", "rules": [{"record": "a:b", "expr": "sum(up)"}]},
        {
            "name": "two",
            "rules": [{"alert": "Down", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }}"}}],
        },
    ]
    for group in groups:
        (chart / "files" / "rules" / f"{group['name']}.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    dashboard = '{"title": "A", "legend": "{{pod}}"}'
    (chart / "files" / "dashboards" / "qwen_service.json").write_text(dashboard)
    objects = render(helm, monitoring, chart=chart)
    check(objects)
    assert of_kind(objects, "PrometheusRule")["spec"]["groups"] == groups
    (shown,) = [one for one in objects if one["metadata"]["name"].endswith("-dashboard-qwen-service")]
    assert shown["data"] == {"qwen_service.json": dashboard}
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_notes_say_what_to_do_next(helm: str) -> None:
    command = [helm, "install", "qwen", str(CHART), "--dry-run=client", "-f", str(CHART / "values-laptop.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("helm test qwen", "port-forward service/qwen-qwen-ray-serve-svc 8000:8000", '"model": "demo"'):
        assert text in done.stdout
