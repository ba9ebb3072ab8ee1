"""`qwen-ray pull`: a model's files into the cache, with a bar."""

from __future__ import annotations

from pathlib import Path

from qwen_ray.commands.console import out, progress_bars
from qwen_ray.config import ModelSettings, Settings
from qwen_ray.source.resolve import resolve


def run_pull(settings: Settings) -> None:
    for model in settings.models:
        out.print(str(pull(model, settings)), markup=False, soft_wrap=True)


def pull(model: ModelSettings, settings: Settings) -> Path:
    """Where the model's files lie, fetched if need be. Raises SourceError."""
    with progress_bars() as show:
        return resolve(
            model.source,
            settings.cache_dir,
            revision=model.revision,
            on_progress=lambda done, total, what: show(what, done, total),
        )
