"""`qwen-ray plan`: asks the planner, shows its answer. Imports neither torch nor Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

from qwen_ray.commands.console import out
from qwen_ray.commands.helm_values import helm_values
from qwen_ray.commands.pull import pull
from qwen_ray.config import Settings, parse_tokens
from qwen_ray.core.errors import SettingsError
from qwen_ray.core.hardware import Hardware
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.machine import this_machine
from qwen_ray.planner.explain import describe, to_json
from qwen_ray.planner.family import lookup
from qwen_ray.planner.search import plan
from qwen_ray.sizing import plan_request
from qwen_ray.source.config_file import load_config
from qwen_ray.source.purpose import Purpose, load_purpose

PlanFormat = Literal["text", "json", "helm-values"]


def run_plan(
    settings: Settings,
    *,
    hardware: Hardware | None,
    context: str | None,
    concurrency: int | None,
    form: PlanFormat,
) -> None:
    """`hardware` None: this machine. Raises PlanRefused, after showing why, when nothing fits."""
    model = settings.models[0]
    config = family_config(settings)
    request = plan_request(settings, model, config, hardware or this_machine(), only_plan=True)
    if context is not None:
        try:
            request = replace(request, max_model_len=parse_tokens(context))
        except ValueError as error:
            raise SettingsError(f"--context: {error}.", field="context") from error
    if concurrency is not None:
        request = replace(request, concurrency=concurrency)
    report = plan(request)
    if form == "helm-values" and report.chosen:
        out.print(helm_values(settings, report), markup=False, soft_wrap=True, end="", highlight=False)
    elif form == "json":
        out.print(json.dumps(to_json(report), indent=2), markup=False, soft_wrap=True)
    else:
        out.print(describe(report), markup=False, soft_wrap=True)
    report.require()


def family_config(settings: Settings) -> ModelConfig:
    """From the table of the Qwen family where it is in there, so that nothing need be fetched; else from its files."""
    model = settings.models[0]
    known = lookup(model.source)
    if known is not None:
        return Purpose(task="embed").applied(known) if model.task == "embed" else known
    path = pull(model, settings)
    return load_purpose(path, model.task).applied(load_config(path))
