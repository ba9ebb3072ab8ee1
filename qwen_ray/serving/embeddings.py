"""/v1/embeddings: texts or token ids, with the prompt that goes before them, to vectors as JSON or base64."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json

from qwen_ray.core.errors import InvalidRequest, RequestTooLarge
from qwen_ray.core.pooling import Pooling, shaped
from qwen_ray.serving.call import Call
from qwen_ray.serving.generation import new_id, off_loop
from qwen_ray.serving.pooling import Asked, Pooler
from qwen_ray.serving.pooling_schema import MAX_INPUTS, EmbeddingRequest, PromptUsage
from qwen_ray.serving.sse import unless_gone
from qwen_ray.text.retrieval import cut, encode_within, instructed

# Of one answer. As JSON they take some 20 bytes each, and all of it is held at once.
MAX_NUMBERS = 2**22


async def create(body: EmbeddingRequest, request: Request, pooler: Pooler, call: Call) -> Response:
    """Raises RequestError, ClientGone."""
    call.limit(body.timeout, body.priority)
    if call.keeps_contents:
        call.request = body.input
    model = pooler.generator.model
    dimensions = _dimensions(body, model.hidden_size)
    prompts = await _encode(body, pooler)
    asked = Asked(id=new_id("embd"), param="input", prompts=prompts, priority=body.priority)
    vectors = await unless_gone(request, pooler.pool(asked, Pooling(), call))
    normalizes = model.embedding.normalizes if body.use_activation is None else body.use_activation

    def answer() -> bytes:
        return to_body(
            [shaped(vector, dimensions=dimensions, normalizes=normalizes) for vector in vectors],
            model.name,
            asked.num_tokens,
            is_base64=body.encoding_format == "base64",
        )

    content = await off_loop(answer, len(vectors) * dimensions)
    return Response(content, media_type="application/json")


def to_body(vectors: Sequence[array[float]], model: str, num_tokens: int, *, is_base64: bool) -> bytes:
    """An EmbeddingList. Put together by hand: as objects, the numbers would take ten times the memory."""
    items = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%s}'
        % (index, to_json(_to_base64(vector) if is_base64 else vector.tolist()))
        for index, vector in enumerate(vectors)
    )
    usage = PromptUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return b'{"object":"list","data":[%s],"model":%s,"usage":%s}' % (items, to_json(model), to_json(usage))


def _to_base64(vector: array[float]) -> str:
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()


def _dimensions(body: EmbeddingRequest, hidden_size: int) -> int:
    """Raises InvalidRequest, RequestTooLarge."""
    dimensions = hidden_size if body.dimensions is None else body.dimensions
    if dimensions > hidden_size:
        message = f"dimensions must be between 1 and {hidden_size}, got {dimensions}."
        raise InvalidRequest(message, param="dimensions")
    num_inputs = len(body.inputs())
    most = min(MAX_INPUTS, MAX_NUMBERS // dimensions)
    if num_inputs > most:
        message = f"input: at most {most} texts with {dimensions} dimensions each, got {num_inputs}."
        raise RequestTooLarge(message, param="input", code="too_long")
    return dimensions


async def _encode(body: EmbeddingRequest, pooler: Pooler) -> list[list[int]]:
    before = _prompt_before(body, pooler)
    model, tokenizer = pooler.generator.model, pooler.generator.tokenizer
    max_tokens, side = body.max_tokens(model.max_model_len), body.truncation_side or "right"

    def encode(one: str | list[int]) -> list[int]:
        if isinstance(one, str):
            return encode_within(
                tokenizer,
                before + one,
                add_special_tokens=body.add_special_tokens,
                max_tokens=max_tokens,
                side=side,
            )
        return one if max_tokens is None else cut(one, max_tokens, side)

    inputs = body.inputs()
    num_characters = sum(len(before) + len(one) for one in inputs if isinstance(one, str))
    return await pooler.encode("input", inputs, encode, num_characters)


def _prompt_before(body: EmbeddingRequest, pooler: Pooler) -> str:
    """What goes before each text. Raises InvalidRequest for a name that the checkpoint does not know."""
    if body.instruction is not None:
        return instructed("", body.instruction)
    config = pooler.generator.model.embedding
    name = body.prompt_name or config.default_prompt_name
    if name is None:
        return ""
    if name not in config.prompts:
        known = ", ".join(config.prompts) or "none"
        raise InvalidRequest(f"prompt_name: this model has no prompt {name!r}; known: {known}.", param="prompt_name")
    return config.prompts[name]
