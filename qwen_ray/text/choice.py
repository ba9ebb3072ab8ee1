"""One sequence's tokens on their way to text: detokenizer, stop strings, markup, and what a client wants to know.

Knows one choice of one answer; nothing of JSON or of other choices.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.core.request import GenerateRequest, TokenDelta, TokenLogprobs
from qwen_ray.text.detokenizer import IncrementalDetokenizer
from qwen_ray.text.qwen_markup import Marked, QwenMarkup
from qwen_ray.text.stop import StopMatcher
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.text.tool_calls import CallDelta, ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a choice gains. `text` may be empty; `stop_reason` is the stop string or token id that ended it.

    `reasoning` is what the model thinks, where that is told apart; in a piece with both it comes first. `calls` come
    last. `said` is all of it as the model put it. The finish reason is "tool_calls" where it ends to have tools called.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    said: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    pooled: bytes = b""  # as in TokenDelta


class Choice:
    """`push` every delta of the sequence, in order; nothing is to be pushed after a piece with a finish reason.

    `splits_thinking`: what the model thinks, if it does, is no part of the text; with `tools`, calls of them are not.
    Without, the text is all that it says.
    """

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        stops: tuple[str, ...],
        tokenizer: Tokenizer,
        *,
        splits_thinking: bool = False,
        tools: ToolUse | None = None,
    ) -> None:
        sampling = request.sampling
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.num_reasoning_tokens = 0  # the tags' own included
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._keeps_stop = sampling.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            prompt_token_ids=request.prompt_token_ids,
        )
        self._matcher = StopMatcher(stops, include=self._keeps_stop)
        self._min_tokens = sampling.min_tokens
        self._thinking = sampling.thinking if splits_thinking else None
        self._is_thinking = self._thinking is not None and self._thinking.starts_open
        grammar = sampling.grammar
        # Where a grammar has begun, nothing is thought any more: a tag in one of its texts is no tag.
        thinks = self._thinking is not None and (grammar is None or grammar.after_thinking)
        has_markup = thinks or tools is not None
        self._markup = (
            QwenMarkup(thinks=thinks, starts_open=self._is_thinking, tools=tools, thinks_first=grammar is not None)
            if has_markup
            else None
        )

    def push(self, delta: TokenDelta) -> Piece:
        said = ""
        markup = self._markup
        marked: list[Marked] = []
        count = 0
        last = len(delta.token_ids) - 1
        for i, token_id in enumerate(delta.token_ids):
            count += 1
            self._count_reasoning(token_id)
            is_stop_token = i == last and delta.stop_token_id is not None
            if not is_stop_token or self._keeps_stop:
                text = self._add(token_id)
                said += text
                if markup is not None:
                    marked.append(markup.push(text))
            if self._matcher.matched is not None or (markup is not None and markup.is_over):
                break
        self.num_tokens += count
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        stop_reason: int | str | None = self._matcher.matched
        if stop_reason is not None or (markup is not None and markup.is_over):
            self.finish_reason = "stop"
        elif delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            text = self._matcher.push(self._detokenizer.finish()) + self._matcher.finish()
            said += text
            if markup is not None:
                marked.append(markup.push(text))
            if delta.stop_token_id in self.request.sampling.stop_token_ids:
                stop_reason = delta.stop_token_id
        if markup is not None and self.finish_reason is not None:
            marked.append(markup.finish())
        return Piece(
            index=self.index,
            text=said if markup is None else "".join([one.content for one in marked]),
            reasoning="".join([one.reasoning for one in marked]),
            calls=tuple([call for one in marked for call in one.calls]),
            said=said,
            token_ids=delta.token_ids[:count],
            logprobs=delta.logprobs[:count],
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason=self._told_reason,
            stop_reason=stop_reason,
            pooled=delta.pooled,
        )

    @property
    def _told_reason(self) -> str | None:
        asks = self.finish_reason == "stop" and self._markup is not None and self._markup.asks_for_calls
        return "tool_calls" if asks else self.finish_reason

    def _add(self, token_id: int) -> str:
        text = self._detokenizer.push((token_id,))
        # Until min_tokens are out, no stop string may end it (as in vLLM, none that began before counts).
        self._min_tokens -= 1
        return text if self._min_tokens >= 0 else self._matcher.push(text)

    def _count_reasoning(self, token_id: int) -> None:
        thinking = self._thinking
        if thinking is not None:
            is_inside = self._is_thinking or token_id == thinking.start_id
            self.num_reasoning_tokens += is_inside
            self._is_thinking = is_inside and token_id != thinking.end_id
