"""OpenAI's tools as pydantic models: what may be called, and calls of the conversation so far."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from qwen_ray.serving.fields import Flag, Part

MAX_TOOLS = 128  # as OpenAI has it
MAX_TOOL_BYTES = 2**16  # of one function's parameters, as JSON, and of its description
MAX_CALLS = 128  # of one message

# OpenAI's, and what else stands in names of MCP servers' tools. It is written in markup: no white space, no brackets.
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class Function(Part):
    """`strict`: arguments keep to the schema, whatever the model would rather say."""

    name: FunctionName
    description: Annotated[str, Field(max_length=MAX_TOOL_BYTES)] | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None

    @field_validator("parameters")
    @classmethod
    def _parameters_are_small(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and (size := len(json.dumps(value))) > MAX_TOOL_BYTES:
            raise ValueError(f"must have at most {MAX_TOOL_BYTES} characters of JSON, got {size}")
        return value


class Tool(Part):
    type: Literal["function"]
    function: Function

    def to_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Part):
    """`arguments` is JSON, as the model wrote it."""

    name: str
    arguments: str | dict[str, Any] = ""


class Call(Part):
    """One that an assistant has made before. `index` is what streams call it by."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def to_template(self) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": self.function.name, "arguments": self.function.arguments}}
        return call if self.id is None else {"id": self.id, **call}


Calls = Annotated[list[Call], Field(max_length=MAX_CALLS, fail_fast=True)]
