"""What the models of requests are made of: JSON's kinds of values, taken as they are, and parts of bodies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticUseDefault

MAX_KEYS = 100  # of an object whose keys are known
MIN_TIMEOUT, MAX_TIMEOUT = 0.001, 7 * 24 * 3600.0  # seconds

# JSON numbers only: "0.5" and true are mistakes, not numbers. Ranges are SamplingParams' business.
Number = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Timeout = Annotated[Number, Field(ge=MIN_TIMEOUT, le=MAX_TIMEOUT)]


def null_is_default(value: Any) -> Any:
    """OpenAI takes null for whatever may be left out, and some clients send it."""
    if value is None:
        raise PydanticUseDefault
    return value


Switch = Annotated[Flag, BeforeValidator(null_is_default, json_schema_input_type=Flag | None)]
Amount = Annotated[Count, BeforeValidator(null_is_default, json_schema_input_type=Count | None)]
# Unless it fails fast, every wrong item is an error that is kept: a body of 8 MiB can hold millions.
TokenIds = Annotated[list[Count], Field(max_length=2**20, fail_fast=True)]


def refuse_many_keys(value: Any) -> Any:
    """Each unknown one would be an error of its own, kept until all are found."""
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise ValueError(f"has more than {MAX_KEYS} fields")
    return value


class Part(BaseModel):
    """What a body holds many of."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_small(cls, data: Any) -> Any:
        return refuse_many_keys(data)
