"""The public names. They are looked up on first use, so that `import qwen_ray` costs nothing and brings no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_ray.config import Settings
    from qwen_ray.core.request import Grammar, SamplingParams
    from qwen_ray.llm import LLM, RequestOutput

__all__ = ["LLM", "Grammar", "RequestOutput", "SamplingParams", "Settings", "__version__"]

__version__ = version("qwen-ray")

_HOMES = {
    "Grammar": "qwen_ray.core.request",
    "LLM": "qwen_ray.llm",
    "RequestOutput": "qwen_ray.llm",
    "SamplingParams": "qwen_ray.core.request",
    "Settings": "qwen_ray.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen_ray' has no attribute {name!r}")
    if name == "LLM":
        import_module("qwen_ray.config").take_cpu_environment()
    return getattr(import_module(_HOMES[name]), name)
