"""What clients write to have an answer follow a grammar: OpenAI's `response_format`, vLLM's `structured_outputs`, and
its older `guided_*`, as pydantic models.

Knows the shape of JSON, and which field is which kind of grammar; not whether a grammar is any good.
"""

from __future__ import annotations

import json
from collections.abc import Sized
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.request import Grammar, GrammarKind

MAX_CHOICES = 4096


def _few_enough(choices: object) -> object:
    """A grammar that nobody can follow is a wrong value, unlike a text or a list of texts that is too large."""
    if isinstance(choices, Sized) and len(choices) > MAX_CHOICES and not isinstance(choices, str):
        raise ValueError(f"at most {MAX_CHOICES} choices are taken, got {len(choices)}")
    return choices


Choices = Annotated[
    list[str],
    Field(min_length=1, fail_fast=True, json_schema_extra={"maxItems": MAX_CHOICES}),
    BeforeValidator(_few_enough),
]
Schema = dict[str, Any] | str  # vLLM takes it as text too
Flag = Annotated[bool, Field(strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JsonSchemaFormat(_Part):
    """Every answer follows the schema, `strict` or not."""

    name: str
    description: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: Flag | None = None


class ResponseFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self


class StructuredOutputs(_Part):
    """vLLM's; one of them."""

    content: Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: Flag | None = None


class GrammarFields(BaseModel):
    """What chat and completions have in common of it."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def grammar(self) -> tuple[str, Grammar] | None:
        """The field that asks for one, as the client wrote it, and what it asks for.

        Raises InvalidRequest: two at once, structured outputs of no kind, or more than a grammar may be.
        """
        found = [given for given in self._given() if given[2] is not None]
        if len(found) > 1:
            names = " and ".join(field for field, _, _ in found[:2])
            raise InvalidRequest(f"{names} cannot be used together: an answer follows one.", param=found[1][0])
        if not found:
            if self.structured_outputs is not None:
                message = "structured_outputs needs one of json, regex, choice, grammar and json_object."
                raise InvalidRequest(message, param="structured_outputs")
            return None
        field, kind, value = found[0]
        try:
            return field, Grammar(kind=kind, text=_text(value))
        except InvalidRequest as error:
            raise InvalidRequest(f"{field}: {error.message}", param=field) from error

    def _given(self) -> list[tuple[str, GrammarKind, Any]]:
        form = self.response_format or ResponseFormat(type="text")
        schema = None if form.json_schema is None else form.json_schema.content
        is_object = "" if form.type == "json_object" else None
        asked = self.structured_outputs or StructuredOutputs()
        return [
            ("response_format.json_schema.schema", "json_schema", schema),
            ("response_format", "json_object", is_object),
            ("structured_outputs.json", "json_schema", asked.content),
            ("structured_outputs.regex", "regex", asked.regex),
            ("structured_outputs.choice", "choice", asked.choice),
            ("structured_outputs.grammar", "grammar", asked.grammar),
            ("structured_outputs.json_object", "json_object", "" if asked.json_object else None),
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        ]


def _text(value: dict[str, Any] | list[str] | str) -> str:
    """Keys stay in their order: it is that of the answer's."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise InvalidRequest("NaN and Infinity are no JSON.") from error
