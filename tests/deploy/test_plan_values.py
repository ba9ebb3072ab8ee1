"""What `qwen-ray plan --format helm-values` prints is what the chart takes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from charts import CHART, READY, check, pod_templates, render, serve_config

from qwen_ray.cli import main
from qwen_ray.config import Settings

HARDWARE = {"one-gpu": "2x1xL4-24G", "72b-8gpu": "2x8xH100-80G", "235b-2x8gpu": "2x8xH100-80G"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments, "--format", "helm-values"])
    assert (ended.value.code or 0) == code
    text = capsys.readouterr().out
    return text if code else yaml.safe_load(text)


@pytest.mark.parametrize(
    ("arguments", "plan", "replicas", "groups"),
    [
        (
            ["Qwen/Qwen2.5-72B-Instruct", "--hardware", "8xH100-80G", "--tp", "8"],
            {"tp": 8, "pp": 1},
            {"min": 1, "max": 1},
            [("8xh100-80g", 1, 1, 8)],
        ),
        (
            ["Qwen/Qwen3-235B-A22B", "--hardware", "2x8xH100-80G", "--pp", "2", "--tp", "8"],
            {"tp": 8, "pp": 2, "ep": 1, "dp_attention": 1},
            {"min": 1, "max": 1},
            [("8xh100-80g", 2, 2, 8)],
        ),
        (
            ["Qwen/Qwen3-8B", "--hardware", "4x2xH100-80G", "--tp", "2", "--min-replicas", "2", "--max-replicas", "3"],
            {"tp": 2, "pp": 1},
            {"min": 2, "max": 3},
            [("2xh100-80g", 2, 3, 2)],
        ),
        (
            ["Qwen/Qwen3-0.6B", "--hardware", "2x1xcpu-16G", "--max-model-len", "4k", "--max-num-seqs", "8"],
            {"tp": 1, "pp": 1},
            {"min": 1, "max": 2},
            [("1xcpu-16g", 1, 2, 0)],
        ),
    ],
)
def test_the_chart_takes_what_is_printed(
    helm: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    plan: dict[str, int],
    replicas: dict[str, int],
    groups: list[tuple[str, int, int, int]],
) -> None:
    values = printed(capsys, *arguments)
    (model,) = values["models"]
    assert (model["plan"], model["replicas"]) == (plan, replicas)
    found = [(g["name"], g["minReplicas"], g["maxReplicas"], g["gpus"]) for g in values["workerGroups"]]
    assert found == groups
    objects = render(helm, values)
    check(objects)
    settings = Settings.from_dict(serve_config(objects)["applications"][0]["args"])
    assert settings.models[0].plan == Settings.from_dict({"models": [{"plan": plan}]}).models[0].plan
    assert set(pod_templates(objects)) == {"head", *(name for name, *_ in groups)}


@pytest.mark.parametrize("ready", sorted(set(READY) - {"laptop"}))
def test_ready_values_are_what_the_planner_says(capsys: pytest.CaptureFixture[str], ready: str) -> None:
    file = CHART / f"values-{ready}.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    (model,) = values["models"]
    asked = [model["source"], "--context", model["max_model_len"], "--dtype", model["dtype"]]
    degrees = ["--tp", str(model["plan"]["tp"]), "--pp", str(model["plan"]["pp"])]
    replicas = ["--min-replicas", str(model["replicas"]["min"]), "--max-replicas", str(model["replicas"]["max"])]
    said = printed(capsys, *asked, *degrees, *replicas, "--hardware", HARDWARE[ready])
    assert said["models"][0]["max_model_len"] == int(model["max_model_len"].removesuffix("k")) * 1024
    for given, wanted in zip(values["workerGroups"], said["workerGroups"], strict=True):
        for key in ("minReplicas", "maxReplicas", "gpus"):
            assert given[key] == wanted[key]
    assert int(values["weights"]["size"].removesuffix("Gi")) >= int(said["weights"]["size"].removesuffix("Gi"))


def test_more_replicas_than_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    hardware = ["--hardware", "8xH100-80G", "--tp", "8", "--max-replicas", "2"]
    assert printed(capsys, "Qwen/Qwen2.5-72B-Instruct", *hardware, code=5) == ""


def test_what_does_not_fit_is_shown_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Nothing fits" in printed(capsys, "Qwen/Qwen2.5-72B-Instruct", "--hardware", "1xH100-80G", code=5)


def test_two_formats_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "Qwen/Qwen3-8B", "--hardware", "1xH100-80G", "--json", code=2)
