"""What Qwen3's embedding and reranking models are asked with: an instruction before a query, a pair to be judged.

The words are those of the models' documentation, line for line. Knows texts and token ids, not vectors and logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.text.tokenizer import Tokenizer

Side = Literal["left", "right"]

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_BEFORE = f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n"
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def instructed(query: str, instruction: str) -> str:
    """A query to be embedded; documents get no instruction."""
    return f"Instruct: {instruction}\nQuery:{query}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPrompt:
    """A query and a document as one question, which is answered with the token `yes_id` or `no_id`."""

    tokenizer: Tokenizer
    before: tuple[int, ...]
    behind: tuple[int, ...]
    yes_id: int
    no_id: int

    @staticmethod
    def of(tokenizer: Tokenizer) -> PairPrompt:
        """Raises InvalidRequest for a vocabulary in which yes and no are not one token each."""
        answers = [tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no")]
        if any(len(ids) != 1 for ids in answers):
            message = "This model cannot score: its vocabulary has no token `yes`, or none `no`."
            raise InvalidRequest(message, param="model", code="unsupported_task")
        before, behind = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (_BEFORE, _BEHIND))
        return PairPrompt(tokenizer=tokenizer, before=before, behind=behind, yes_id=answers[0][0], no_id=answers[1][0])

    def ids(
        self,
        query: str,
        document: str,
        *,
        instruction: str | None = None,
        max_tokens: int | None = None,
        side: Side = "right",
    ) -> list[int]:
        """The question; of query and document together so much is kept that it has no more than `max_tokens`."""
        text = f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
        pair = self.tokenizer.encode(text, add_special_tokens=False)
        if max_tokens is not None:
            room = max_tokens - len(self.before) - len(self.behind)
            if room < 1:
                message = (
                    f"truncate_prompt_tokens must be above {max_tokens - room}, the question's own, got {max_tokens}."
                )
                raise InvalidRequest(message, param="truncate_prompt_tokens")
            pair = cut(pair, room, side)
        return [*self.before, *pair, *self.behind]


def encode_within(
    tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, max_tokens: int | None = None, side: Side = "right"
) -> list[int]:
    """Token ids, the model's own around them, of which the text loses so many that no more than `max_tokens` are left.

    A vector is that of the last token: one that the model wants at the end must stay there.
    """
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    alone = tokenizer.encode(text, add_special_tokens=False)
    first = next((i for i in range(len(ids) - len(alone) + 1) if ids[i : i + len(alone)] == alone), 0)
    before, behind = ids[:first], ids[first + len(alone) :]
    return [*before, *cut(alone, max_tokens - len(before) - len(behind), side), *behind]


def cut(token_ids: Sequence[int], max_tokens: int, side: Side) -> list[int]:
    """At most `max_tokens` of them: `side` is the one where the others go."""
    kept = max(0, max_tokens)
    return list(token_ids[:kept] if side == "right" else token_ids[max(0, len(token_ids) - kept) :])
