"""OpenAI's answers as pydantic models. Fields that OpenAI always sends are always sent: clients read them unasked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


def is_none(value: object) -> bool:
    """Of fields that only those get who ask for them."""
    return value is None


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


# vLLM's: one entry per prompt token, null for the first; token id -> logprob.
PromptLogprobs = list[dict[str, dict[str, Any]] | None]


class CalledFunction(BaseModel):
    """`arguments` is JSON, in the model's words: they may be broken off, or not what the function expects."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """`content` is null where there are calls alone; without any, `tool_calls` is left out."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] = []
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=is_none)


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | None = Field(None, exclude_if=is_none)


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: Literal["default"] = "default"
    system_fingerprint: str
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = Field(None, exclude_if=is_none)


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = Field(None, exclude_if=is_none)
    token_ids: list[int] | None = Field(None, exclude_if=is_none)


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen-ray"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What vLLM tells of a tokenizer, as far as it is a model's own: lm-eval's remote tokenizer reads it."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class ReplicaStartup(BaseModel):
    """`stage` is what it does now, in words; `error` says why it failed."""

    replica: str
    state: str
    stage: str
    bytes_done: int
    bytes_total: int
    load_seconds: float
    error: str | None


class Startup(BaseModel):
    status: Literal["ready", "loading"]
    replicas: list[ReplicaStartup]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Of every answer that is an error; in a stream that has begun, it is the last event but [DONE]."""

    error: ErrorDetail


class TargetGroup(BaseModel):
    """Of Prometheus' HTTP service discovery."""

    targets: list[str]
    labels: dict[str, str]
