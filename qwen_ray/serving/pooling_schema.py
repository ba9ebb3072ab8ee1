"""What is asked of a model that embeds or scores, and what it answers, as pydantic models.

`/v1/embeddings` is OpenAI's, `/v1/score` vLLM's, `/v1/rerank` that of Jina, Cohere and vLLM. Fields beyond those are
vLLM's too, but for `instruction` and `prompt_name`: a task in words, and one of the checkpoint's own prompts.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, model_validator

from qwen_ray.serving.answer_schema import is_none
from qwen_ray.serving.fields import Amount, Count, Flag, Switch, Timeout, null_is_default
from qwen_ray.serving.schema import Prompt, Request, prompt_list

MAX_INPUTS = 2048  # texts of one request, as OpenAI has it


def _texts(value: Any) -> list[str]:
    """By hand, as prompts are. Some clients wrap each text in an object."""
    many: Any = [value] if isinstance(value, str | dict) else value
    if not isinstance(many, list) or not many:
        raise ValueError("must be a text, or a list of texts that is not empty")
    if len(many) > MAX_INPUTS:
        raise ValueError(f"must hold at most {MAX_INPUTS} texts, got {len(many)}")
    texts: list[Any] = [one["text"] if isinstance(one, dict) and list(one) == ["text"] else one for one in many]
    if any(not isinstance(text, str) for text in texts):
        raise ValueError("must hold texts, or objects with a text and nothing else")
    return texts


class Text(BaseModel):
    """A text, as some clients wrap it."""

    text: str


Texts = Annotated[list[str], PlainValidator(_texts, json_schema_input_type=str | Text | list[str | Text])]


class PoolingRequest(Request):
    """What they have in common. `truncate_prompt_tokens`: -1 is as many as the model takes."""

    not_built: ClassVar[dict[str, tuple[Any, ...]]] = {
        "cache_salt": (),
        "mm_processor_kwargs": (),
        "padding": ("do_not_pad",),
    }

    instruction: str | None = None
    truncate_prompt_tokens: Annotated[Count, Field(ge=-1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: Flag | None = None
    priority: Annotated[Amount, Field(ge=-(2**31), lt=2**31)] = 0
    timeout: Timeout | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _truncates_to_something(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be a number of tokens, or -1 for the model's context; got 0")
        return self

    def max_tokens(self, context: int) -> int | None:
        """What prompts are cut to; None: those that are too long are refused."""
        wish = self.truncate_prompt_tokens
        return context if wish == -1 else wish


Encoding = Annotated[
    Literal["float", "base64"],
    BeforeValidator(null_is_default, json_schema_input_type=Literal["float", "base64"] | None),
]


class EmbeddingRequest(PoolingRequest):
    not_built: ClassVar[dict[str, tuple[Any, ...]]] = {
        **PoolingRequest.not_built,
        "messages": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
    }

    input: Prompt
    encoding_format: Encoding = "float"
    dimensions: Annotated[Count, Field(ge=1)] | None = None
    prompt_name: str | None = None
    add_special_tokens: Switch = True

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Self:
        given = [name for name in ("instruction", "prompt_name") if getattr(self, name) is not None]
        if len(given) == 2:
            raise ValueError("give instruction or prompt_name, not both")
        if given and any(not isinstance(one, str) for one in self.inputs()):
            raise ValueError(f"{given[0]} goes before texts; this input is token ids")
        return self

    def inputs(self) -> list[str | list[int]]:
        """One entry for each vector."""
        return prompt_list(self.input)


class ScoreRequest(PoolingRequest):
    """Pairs: one text with each of several, or as many texts as there are on the other side."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    @model_validator(mode="after")
    def _has_two_sides(self) -> Self:
        for names in (("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")):
            if sum(getattr(self, name) is not None for name in names) != 1:
                raise ValueError(f"give one of {', '.join(names)}")
        first, second = self._sides()
        if len(first) not in (1, len(second)):
            raise ValueError(f"{len(first)} texts do not go with {len(second)}: give one, or as many as of the others")
        return self

    def _sides(self) -> tuple[list[str], list[str]]:
        first = self.text_1 or self.queries or self.data_1 or []
        return first, self.text_2 or self.documents or self.items or self.data_2 or []

    def pairs(self) -> list[tuple[str, str]]:
        first, second = self._sides()
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


class RerankRequest(PoolingRequest):
    not_built: ClassVar[dict[str, tuple[Any, ...]]] = {
        **PoolingRequest.not_built,
        "rank_fields": (),
        "max_chunks_per_doc": (),
        "max_tokens_per_doc": (),
    }

    query: str
    documents: Texts
    top_n: Annotated[Amount, Field(ge=0)] = 0
    return_documents: Switch = True


class PromptUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """`embedding` in base64 is little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class RerankResult(BaseModel):
    """`index` is the document's in the request."""

    index: int
    document: Text | None = Field(None, exclude_if=is_none)
    relevance_score: float


class RerankAnswer(BaseModel):
    """The most relevant document first."""

    id: str
    model: str
    usage: PromptUsage
    results: list[RerankResult]
