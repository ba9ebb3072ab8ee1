"""/v1/score and /v1/rerank: how well pairs of texts go together.

A model that generates is asked for yes or no, as Qwen3's rerankers are; of one that embeds, it is the cosine of the
angle between two vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fastapi import Request

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.pooling import Pooling, cosine, sigmoid
from qwen_ray.serving.call import Call
from qwen_ray.serving.generation import new_id, off_loop
from qwen_ray.serving.pooling import Asked, Pooler
from qwen_ray.serving.pooling_schema import (
    PoolingRequest,
    PromptUsage,
    RerankAnswer,
    RerankRequest,
    RerankResult,
    Score,
    ScoreList,
    ScoreRequest,
    Text,
)
from qwen_ray.serving.sse import unless_gone
from qwen_ray.text.retrieval import PairPrompt, encode_within, instructed


async def score(body: ScoreRequest, request: Request, pooler: Pooler, call: Call) -> ScoreList:
    """Raises RequestError, ClientGone."""
    scoring = _Scoring(id=new_id("score"), param="text_2", body=body, pooler=pooler, call=call)
    scores, usage = await unless_gone(request, scoring.run(body.pairs()))
    return ScoreList(
        id=scoring.id,
        created=int(call.arrival),
        model=pooler.generator.model.name,
        data=[Score(index=index, score=one) for index, one in enumerate(scores)],
        usage=usage,
    )


async def rerank(body: RerankRequest, request: Request, pooler: Pooler, call: Call) -> RerankAnswer:
    """Raises RequestError, ClientGone."""
    scoring = _Scoring(id=new_id("rerank"), param="documents", body=body, pooler=pooler, call=call)
    scores, usage = await unless_gone(request, scoring.run([(body.query, document) for document in body.documents]))
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    return RerankAnswer(
        id=scoring.id,
        model=pooler.generator.model.name,
        usage=usage,
        results=[
            RerankResult(
                index=index,
                document=Text(text=body.documents[index]) if body.return_documents else None,
                relevance_score=scores[index],
            )
            for index in order
        ],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scoring:
    """One request's pairs on their way to scores."""

    id: str
    param: str
    body: PoolingRequest
    pooler: Pooler
    call: Call

    async def run(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], PromptUsage]:
        """Their scores, in their order."""
        self.call.limit(self.body.timeout, self.body.priority)
        if self.call.keeps_contents:
            self.call.request = pairs
        embeds = self.pooler.generator.model.task == "embed"
        return await (self._angles(pairs) if embeds else self._answers(pairs))

    @property
    def _max_tokens(self) -> int | None:
        return self.body.max_tokens(self.pooler.generator.model.max_model_len)

    async def _answers(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], PromptUsage]:
        """How likely yes is where only yes and no are, or, without `use_activation`, how far apart their logits are."""
        question = PairPrompt.of(self.pooler.generator.tokenizer)
        encode = partial(
            question.ids,
            instruction=self.body.instruction,
            max_tokens=self._max_tokens,
            side=self.body.truncation_side or "right",
        )
        num_characters = sum(len(query) + len(document) for query, document in pairs)
        prompts = await self.pooler.encode(self.param, pairs, lambda pair: encode(*pair), num_characters)
        asked = Asked(id=self.id, param=self.param, prompts=prompts, priority=self.body.priority)
        logits = await self.pooler.pool(asked, Pooling(token_ids=(question.yes_id, question.no_id)), self.call)
        apart = [yes - no for yes, no in logits]
        scores = apart if self.body.use_activation is False else list(map(sigmoid, apart))
        return scores, _usage(asked)

    async def _angles(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], PromptUsage]:
        """A text that stands in several pairs is computed once."""
        if self.body.use_activation is not None:
            message = "use_activation has no meaning for a model that embeds: scores are cosines. Leave it out."
            raise InvalidRequest(message, param="use_activation")
        instruction = self.body.instruction
        if instruction is not None:
            pairs = [(instructed(query, instruction), document) for query, document in pairs]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        encode = partial(
            encode_within,
            self.pooler.generator.tokenizer,
            add_special_tokens=True,
            max_tokens=self._max_tokens,
            side=self.body.truncation_side or "right",
        )
        prompts = await self.pooler.encode(self.param, list(numbers), encode, sum(map(len, numbers)))
        asked = Asked(id=self.id, param=self.param, prompts=prompts, priority=self.body.priority)
        vectors = await self.pooler.pool(asked, Pooling(), self.call)

        def angles() -> list[float]:
            return [cosine(vectors[numbers[query]], vectors[numbers[document]]) for query, document in pairs]

        return await off_loop(angles, len(pairs) * len(vectors[0])), _usage(asked)


def _usage(asked: Asked) -> PromptUsage:
    return PromptUsage(prompt_tokens=asked.num_tokens, total_tokens=asked.num_tokens)
