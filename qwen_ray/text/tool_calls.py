"""How a Qwen model writes a call of a tool, and what one is made of.

Knows which of two syntaxes a model speaks, by its chat template; each has a module of its own that reads one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_ray.text.call_reader import CALL_END, CALL_START, CallReader
from qwen_ray.text.coder_call import FUNCTION_START, CoderCall
from qwen_ray.text.hermes_call import HermesCall

ToolSyntax = Literal["hermes", "coder"]
CALL_TAGS = (CALL_START, CALL_END)


def tool_syntax(speaks_of: Callable[[str], bool]) -> ToolSyntax | None:
    """Of the model whose chat template `speaks_of` a text: Qwen3-Coder's, Qwen2.5's and Qwen3's, or none."""
    if speaks_of(FUNCTION_START):
        return "coder"
    return "hermes" if speaks_of(CALL_START) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """What a piece of text adds to call `index` of an answer: its name first, and JSON for its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """How one answer may call: `parameters` has the JSON schema of each function's arguments, by its name."""

    syntax: ToolSyntax
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    is_parallel: bool = True

    @property
    def openers(self) -> tuple[str, ...]:
        """Qwen3-Coder now and then forgets the outer tag."""
        return (CALL_START, FUNCTION_START) if self.syntax == "coder" else (CALL_START,)

    def reader(self) -> CallReader:
        return CoderCall(self.parameters) if self.syntax == "coder" else HermesCall()
