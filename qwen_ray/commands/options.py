"""Turns the settings tree into command-line options: one source of truth, `config.OPTIONS`.

A command decorated with `with_settings("dtype", ...)` gets those flags and `-f`, and is called with the Settings that
came of file, environment and flags. Values go to pydantic as they were typed, so that a wrong one is refused by the
same rule and in the same words wherever it stands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from qwen_ray.config import ENV_PREFIX, OPTIONS, Section, Settings, load_settings

PANELS = {"models": "Model", "http": "HTTP", "engine": "Engine", "observability": "Observability"}
MODEL_FLAGS = tuple(flag for flag, key in OPTIONS.items() if key.startswith("models.") and flag != "model")
ENGINE_FLAGS = tuple(flag for flag, key in OPTIONS.items() if key.startswith("engine."))
ALL_FLAGS = tuple(flag for flag in OPTIONS if flag != "model")
# A batch says itself how many replicas there are, and its queue is its file.
BATCH_FLAGS = (
    *(
        flag
        for flag in (*MODEL_FLAGS, *ENGINE_FLAGS)
        if flag not in ("min-replicas", "max-replicas", "max-num-waiting")
    ),
    "log-level",
    "log-format",
    "cache-dir",
    "address",
)

FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", metavar="FILE", help="Settings file (YAML). Environment variables and flags win over it."
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="demo, a directory, a .gguf file, or a Hugging Face id. Default: the settings', or demo.",
    ),
]


def _section(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as `tuple[ModelSettings, ...]` or `Literal["auto"] | PlanSettings`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


def field_of(key: str) -> FieldInfo:
    """The settings field behind a dotted key of OPTIONS."""
    section: type[Section] = Settings
    *path, last = (part for part in key.split(".") if part != "0")
    for part in path:
        section = _section(section.model_fields[part].annotation) or section
    return section.model_fields[last]


def _metavar(annotation: Any) -> str:
    names = {int: "N", float: "X", Path: "FILE"}
    if get_origin(annotation) is Literal:
        return "NAME"
    kinds = [annotation, *(kind for part in get_args(annotation) for kind in (part, *get_args(part)))]
    return next((names[kind] for kind in kinds if kind in names), "TEXT")


def _option(flag: str) -> inspect.Parameter:
    key = OPTIONS[flag]
    field = field_of(key)
    shown_key = key.replace("models.0", r"models\[0]")
    choices = f": {', '.join(get_args(field.annotation))}" if get_origin(field.annotation) is Literal else ""
    default = "" if field.default in (None, "", ()) else f" Default: {field.default}."
    text = f"{field.description or field.title or flag.replace('-', ' ')}{choices}.{default} [dim]{shown_key}[/]"
    is_switch = field.annotation is bool
    names = (f"--{flag}/--no-{flag}",) if is_switch else (f"--{flag}",)
    option = typer.Option(
        *names,
        metavar="" if is_switch else _metavar(field.annotation),
        help=text[0].upper() + text[1:],
        rich_help_panel=PANELS.get(key.split(".")[0], "General"),
        show_default=False,
    )
    kind = bool if is_switch else str
    return inspect.Parameter(
        flag.replace("-", "_"), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def with_settings(*flags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `-f` and the named flags; it receives `settings` in their place.

    A parameter called `model` of the command is passed to it and also sets the model of the settings.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        options = [_option(flag) for flag in flags]
        file = inspect.Parameter("file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=FileOption)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {flag: values.pop(flag.replace("-", "_")) for flag in flags}
            settings = load_settings(values.pop("file"), {**given, "model": values.pop("model", None)})
            command(settings=settings, **values)

        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters = [*keyword_only, file, *options]
        run.__dict__["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def environment_variable(flag: str) -> str:
    return ENV_PREFIX + flag.replace("-", "_").upper()
