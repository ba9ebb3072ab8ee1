"""The chart as helm renders it, and what an API server would say of the objects. Not a test."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "helm" / "qwen-ray"
READY = sorted(file.stem.removeprefix("values-") for file in CHART.glob("values-*.yaml"))
KUBERNETES = "1.34"
Object = dict[str, Any]


def render(helm: str, values: Object | None = None, *, ready: str | None = None, chart: Path = CHART) -> list[Object]:
    """Objects, hooks too. Fails the test with helm's words."""
    done = _template(helm, values, ready, chart)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def refusal(helm: str, values: Object, *, ready: str | None = None) -> str:
    """What helm says of values that it must not take."""
    done = _template(helm, values, ready, CHART)
    assert done.returncode != 0, "taken"
    return done.stderr


def of_kind(objects: list[Object], kind: str) -> Object:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def serve_config(objects: list[Object]) -> Object:
    return yaml.safe_load(of_kind(objects, "RayService")["spec"]["serveConfigV2"])


def pod_templates(objects: list[Object]) -> dict[str, Object]:
    """`head` and worker groups by name -> their pods."""
    cluster = of_kind(objects, "RayService")["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


def check(objects: list[Object]) -> None:
    """Every object by a schema: an unknown field, and a kind that has none, fail."""
    for one in objects:
        file = ROOT / "tests" / "deploy" / "crds" / f"{one['kind']}.json"
        if file.exists():
            Draft7Validator(_with_defaults(json.loads(file.read_text()))).validate(one)
        else:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        if one["kind"] == "RayService":
            for name, template in pod_templates(objects).items():
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
                pod["metadata"] = {"name": name, **template["metadata"]}
                kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def _template(helm: str, values: Object | None, ready: str | None, chart: Path) -> subprocess.CompletedProcess[str]:
    command = [helm, "template", "qwen", str(chart), "--namespace", "models"]
    if ready is not None:
        command += ["-f", str(CHART / f"values-{ready}.yaml")]
    if values is not None:
        command += ["-f", "-"]
    return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)


def _with_defaults(schema: Any) -> Any:
    """What has a default is filled in by the API server, so it need not be given."""
    if isinstance(schema, list):
        return [_with_defaults(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _with_defaults(one) for key, one in schema.items()}
    properties, required = made.get("properties"), made.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        made["required"] = [name for name in required if "default" not in properties.get(name, {})]
    return made
