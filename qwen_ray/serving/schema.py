"""OpenAI's requests as pydantic models, with vLLM's extra sampling fields.

Knows the shape of JSON and nothing of tokens or engines. An option is either built, or refused with its name: unknown
fields are errors, and so is a known one that is not built yet and carries more than its default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from qwen_ray.core.request import MAX_LOGIT_BIAS, SamplingParams
from qwen_ray.serving.fields import (
    Amount,
    Count,
    Flag,
    Number,
    Part,
    Switch,
    Timeout,
    TokenIds,
    null_is_default,
    refuse_many_keys,
)
from qwen_ray.serving.grammar_schema import GrammarFields
from qwen_ray.serving.message_schema import ConversationFields, Messages
from qwen_ray.serving.tool_schema import ToolChoice
from qwen_ray.text.chat import Conversation

MAX_DEPTH = 100  # of objects and lists in one another


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _containers(outer)]
        if not level:
            return False
    return True


def _containers(value: dict[str, Any] | list[Any]) -> list[Any]:
    """Objects and lists right inside; of a million token ids it says quickly that there are none."""
    items = value.values() if isinstance(value, dict) else value
    if not {dict, list} & set(map(type, items)):
        return []
    return [item for item in items if isinstance(item, dict | list)]


def _one_or_many(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _token_keys(value: Any) -> Any:
    """JSON has no integer keys: OpenAI's logit_bias is {"50256": -100}."""
    if not isinstance(value, dict):
        return {} if value is None else value
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must hold at most {MAX_LOGIT_BIAS} entries")
    for key in value:
        if not str(key).isdecimal():
            raise ValueError(f"keys must be token ids, got {key!r}")
    return {int(key): bias for key, bias in value.items()}


class Request(BaseModel):
    """A body whose every field is known. `not_built` are fields refused unless null, empty or their listed default."""

    model_config = ConfigDict(extra="forbid")
    not_built: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if _is_deep(data):
            raise ValueError(f"the body has more than {MAX_DEPTH} objects and lists in one another")
        refuse_many_keys(data)
        for name, defaults in cls.not_built.items():
            value = data.get(name)
            if value is not None and value not in ([], {}, *defaults):
                raise NotBuilt(name)
        return {name: value for name, value in data.items() if name not in cls.not_built}


class NotBuilt(ValueError):
    """A known option that is not served yet; `param` names it."""

    def __init__(self, param: str) -> None:
        super().__init__(f"{param} is not supported by this server yet; leave it out")
        self.param = param


class StreamOptions(Part):
    """Nothing is added to events to hide how long they are, whatever OpenAI does."""

    include_usage: Switch = False
    include_obfuscation: Literal[False] | None = None


class SamplingFields(GrammarFields, Request):
    """What chat and completions have in common."""

    n: Amount = 1
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Count | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[
        dict[int, Number], BeforeValidator(_token_keys, json_schema_input_type=dict[str, float] | None)
    ] = Field(default_factory=dict)
    seed: Count | None = None
    stop: Annotated[
        list[str], Field(fail_fast=True), BeforeValidator(_one_or_many, json_schema_input_type=str | list[str] | None)
    ] = Field(default_factory=list)
    include_stop_str_in_output: Switch = False
    stop_token_ids: Annotated[TokenIds, BeforeValidator(null_is_default, json_schema_input_type=TokenIds | None)] = (
        Field(default_factory=list)
    )
    ignore_eos: Switch = False
    max_tokens: Count | None = None
    min_tokens: Amount = 0
    prompt_logprobs: Count | None = None
    return_token_ids: Switch = False
    skip_special_tokens: Switch = True
    priority: Annotated[Amount, Field(ge=-(2**31), lt=2**31)] = 0
    timeout: Timeout | None = None
    stream: Switch = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest, naming the field, for a value out of range."""
        given: dict[str, float | int] = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        return SamplingParams(
            n=self.n,
            **given,  # pyright: ignore[reportArgumentType]
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=dict(self.logit_bias),
            seed=self.seed,
            stop=tuple(self.stop),
            include_stop_str_in_output=self.include_stop_str_in_output,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
        )


class ChatRequest(SamplingFields, ConversationFields):
    not_built: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": (),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": (),
        "verbosity": (),
        "store": (False,),
        "moderation": (),
        "prompt_cache_options": (),
        "chat_template": (),
    }

    messages: Messages
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Flag | None = None
    service_tier: Literal["auto", "default"] | None = None
    max_completion_tokens: Count | None = None
    enable_thinking: Flag | None = None
    thinking_budget: Count | None = None
    include_reasoning: Switch = True
    logprobs: Switch = False
    top_logprobs: Count | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _alternatives_come_with_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @model_validator(mode="after")
    def _thinks_or_not(self) -> Self:
        if self.enable_thinking not in (None, self.chat_template_kwargs.get("enable_thinking", self.enable_thinking)):
            raise ValueError("enable_thinking contradicts chat_template_kwargs.enable_thinking")
        return self

    def conversation(self) -> Conversation:
        """With tools only where they may be called. Raises InvalidRequest."""
        conversation = self.to_conversation(self.messages, has_tools=self.tool_choice != "none")
        given = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return replace(conversation, variables={**conversation.variables, **given})


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """By hand: a union tries all of its members, item by item, and keeps what each finds wrong."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty")
    kinds = set(map(type, value))
    if kinds == {list}:
        kinds = {list[kind] for prompt in value for kind in set(map(type, prompt))} or {list[int]}
    if kinds not in ({str}, {int}, {list[int]}):
        raise ValueError("must hold texts, token ids, or lists of token ids, and one kind of them only")
    return value


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


def prompt_list(prompt: Any) -> list[str | list[int]]:
    """A `Prompt` as a list of prompts."""
    return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt


class CompletionRequest(SamplingFields):
    not_built: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (1,),
    }

    prompt: Prompt
    suffix: str | None = None
    echo: Switch = False
    logprobs: Count | None = None
    add_special_tokens: Switch = True
    max_tokens: Count | None = 16

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        return prompt_list(self.prompt)


class TokenizeRequest(ConversationFields, Request):
    """vLLM's: a prompt, or the messages of a chat."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Switch = True
    return_token_strs: Switch = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Request):
    tokens: TokenIds
