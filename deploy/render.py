"""Writes what is made of something else, and must stay in step with it (tests/deploy compares).

    python deploy/render.py HELM        HELM: the program, as tests/deploy/tools.py fetches it

helm/qwen-ray/values.schema.json from Settings and `kubernetes_values.py`, helm/qwen-ray/files/ from observability/, and
deploy/manifests/ from the chart with its ready values.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from deploy.kubernetes_values import KUBERNETES
from qwen_ray.config import Settings

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "qwen-ray"
MANIFESTS = ROOT / "deploy" / "manifests"
READY = ("laptop", "one-gpu", "72b-8gpu", "235b-2x8gpu")
SECTIONS = ("models", "http", "engine", "observability", "cache_dir", "node_timeout")
SIZE = {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([kKmMgGtT][iI]?)?[bB]?\s*$"}
KEPT = (
    *("type", "enum", "const", "default", "description", "pattern", "minLength", "required", "additionalProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"),
)
# Helm reads files of its chart only.
COPIES = (("prometheus/rules", "rules", "*.yaml"), ("dashboards", "dashboards", "*.json"))


def values_schema() -> dict[str, Any]:
    """Of the chart's values: Settings' own words as Settings checks them, and Kubernetes'."""
    made = Settings.model_json_schema(mode="validation")
    settings = {key: _plain(made["properties"][key], made["$defs"]) for key in SECTIONS}
    del settings["http"]["properties"]["host"]  # of a pod it is always 0.0.0.0
    settings["cache_dir"] = {"type": "string", "pattern": "^/", "description": "where the weights are mounted"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of helm/qwen-ray",
        "type": "object",
        "additionalProperties": False,
        "properties": {**settings, **KUBERNETES},
    }


def manifests(helm: str) -> dict[str, str]:
    """File name -> the chart with one of its ready values, as `kubectl apply` takes it."""
    return {f"{name}.yaml": _manifest(helm, name) for name in READY}


def copies() -> dict[Path, str]:
    """Where in the chart -> what stands in observability/."""
    return {
        CHART / "files" / there / file.name: file.read_text(encoding="utf-8")
        for here, there, pattern in COPIES
        for file in sorted((ROOT / "observability" / here).glob(pattern))
    }


def _manifest(helm: str, name: str) -> str:
    # Hooks (the test) are Helm's own.
    command = [helm, "template", "qwen-ray", str(CHART), "-f", str(CHART / f"values-{name}.yaml"), "--no-hooks"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return (
        f"# Rendered from helm/qwen-ray/values-{name}.yaml by `make render`; edit that.\n"
        f"# kubectl create namespace qwen-ray && kubectl -n qwen-ray apply -f deploy/manifests/{name}.yaml\n"
        + done.stdout.replace("  namespace: default\n", "")
    )


def _plain(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """References written out, and sizes (`4GiB`, `32k`) allowed where Settings reads them."""
    if "$ref" in schema:
        return _plain(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if schema.get("type") == "integer" and "ge" in schema:
        return {"anyOf": [{"type": "integer", "minimum": schema["ge"]}, SIZE]}
    plain = {key: schema[key] for key in KEPT if key in schema}
    if isinstance(schema.get("default"), list | dict):
        del plain["default"]
    if "items" in schema:
        plain["items"] = _plain(schema["items"], definitions)
    if "anyOf" in schema:
        plain["anyOf"] = [_plain(one, definitions) for one in schema["anyOf"]]
    if "properties" in schema:
        plain["properties"] = {name: _plain(one, definitions) for name, one in schema["properties"].items()}
    return plain


def schema_text() -> str:
    return json.dumps(values_schema(), indent=1) + "\n"


def main(helm: str) -> None:
    for _, there, _ in COPIES:
        shutil.rmtree(CHART / "files" / there, ignore_errors=True)
    for file, text in copies().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (CHART / "values.schema.json").write_text(schema_text(), encoding="utf-8")
    MANIFESTS.mkdir(exist_ok=True)
    for name, text in manifests(helm).items():
        (MANIFESTS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
