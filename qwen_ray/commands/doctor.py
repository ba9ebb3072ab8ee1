"""`qwen-ray doctor`: what stands in the way of serving here, as a table of findings or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.table import Table

from qwen_ray.commands.console import err, out
from qwen_ray.config import ModelSettings, Settings
from qwen_ray.core.errors import PlanRefused, QwenRayError, SettingsError
from qwen_ray.core.hardware import Hardware
from qwen_ray.doctor.checks import Question
from qwen_ray.doctor.examine import examine_cluster, examine_machine
from qwen_ray.doctor.finding import Finding, Verdict, guarded
from qwen_ray.machine import this_machine
from qwen_ray.planner.family import lookup
from qwen_ray.planner.memory import model_weights
from qwen_ray.planner.search import plan
from qwen_ray.sizing import plan_request
from qwen_ray.source.config_file import load_config
from qwen_ray.source.demo import DEMO
from qwen_ray.source.purpose import load_purpose
from qwen_ray.source.resolve import present

COLOURS: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "fail": "red"}
PLAN_SECONDS = 60.0


def run_doctor(settings: Settings, *, as_json: bool) -> bool:
    """Whether nothing has failed."""
    findings = _findings(settings)
    worst: Verdict = max((f.verdict for f in findings), key=list(COLOURS).index)
    if as_json:
        shown = {"verdict": worst, "findings": [asdict(finding) for finding in findings]}
        out.print(json.dumps(shown, indent=2), markup=False, soft_wrap=True)
    else:
        _show(findings)
    return worst != "fail"


def _findings(settings: Settings) -> list[Finding]:
    model = settings.models[0]
    findings: list[Finding] = []
    path: Path | None = None
    try:
        path = present(model.source, settings.cache_dir, revision=model.revision)
    except QwenRayError as error:
        advice = "Name a directory, a .gguf file, a Hugging Face id, or demo."
        findings.append(Finding(check="model", verdict="fail", message=str(error), advice=advice))
    question = Question(
        cache_dir=str(settings.cache_dir),
        host=settings.http.host,
        port=settings.http.port,
        model=model.source if path is not None else "",
        fetch_bytes=0 if path is not None else _bytes_to_fetch(model),
    )
    if question.fetch_bytes:
        question = replace(question, model=model.source)
    hardware: Hardware | None = None
    if settings.ray_address:
        found, hardware = examine_cluster(settings.ray_address, question, _watch)
        findings += found
    else:
        seen: list[Hardware] = []
        findings += guarded("hardware", PLAN_SECONDS, lambda: seen.append(this_machine()) or [])
        hardware = seen[0] if seen else None
        nodes = hardware.nodes if hardware else ()
        num_gpus = sum(node.num_devices for node in nodes if node.device.kind == "cuda")
        findings += examine_machine(question, num_gpus, _watch)
    if hardware is not None:
        findings += guarded("memory", PLAN_SECONDS, partial(_memory, settings, model, path, hardware))
    return findings


def _watch(what: str) -> None:
    err.print(f"looking at {what} ...", markup=False)


def _bytes_to_fetch(model: ModelSettings) -> int:
    """0 where nobody here knows."""
    if model.source == "demo":
        return DEMO.wheel_bytes + DEMO.num_bytes
    config = lookup(model.source)
    return model_weights(config).total if config else 0


def _memory(settings: Settings, model: ModelSettings, path: Path | None, hardware: Hardware) -> list[Finding]:
    """Whether the plan fits into what may be used of these machines."""
    config = load_purpose(path, model.task).applied(load_config(path)) if path else lookup(model.source)
    if config is None:
        message = f"{hardware.description}; what {model.source} needs is known when it is here"
        return [Finding(check="memory", verdict="warn", message=message, advice=f"qwen-ray pull {model.source}")]
    try:
        chosen = plan(plan_request(settings, model, config, hardware, dp=model.replicas.max)).require()
    except (PlanRefused, SettingsError) as error:
        why = getattr(error, "inequality", None) or str(error)
        advice = "Ask `qwen-ray plan` what would fit: --dtype, --quantization, --max-model-len, more ranks."
        message = f"{model.source} does not fit {hardware.description}: {why}"
        return [Finding(check="memory", verdict="fail", message=message, advice=advice)]
    return [
        Finding(check="memory", verdict="ok", message=f"{model.source} fits {hardware.description} as {chosen.degrees}")
    ]


def _show(findings: list[Finding]) -> None:
    if not out.is_terminal:
        for finding in findings:
            where = f" ({finding.node})" if finding.node else ""
            advice = f" -> {finding.advice}" if finding.advice else ""
            line = f"{finding.verdict:<4} {finding.check}{where}: {finding.message}{advice}"
            out.print(line, markup=False, soft_wrap=True)
        return
    has_nodes = any(finding.node for finding in findings)
    table = Table("", "check", *(["node"] if has_nodes else []), "found", "what to do")
    for finding in findings:
        colour = COLOURS[finding.verdict]
        node = [finding.node] if has_nodes else []
        cells = [finding.check, *node, finding.message, finding.advice]
        table.add_row(f"[{colour}]{finding.verdict}[/]", *(cell.replace("[", r"\[") for cell in cells))
    out.print(table)
