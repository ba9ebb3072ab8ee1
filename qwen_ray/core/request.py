"""What goes into an engine and what comes out: token ids and sampling parameters, no strings, no tensors.

`SamplingParams` is what a user asks for. `GenerateRequest` is one sequence to be continued; it carries what was
generated before, so that handing a request to another replica is nothing but submitting it again. `TokenDelta` is
what one engine step adds to one request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from qwen_ray.core.errors import DEADLINE_EXCEEDED, DeadlineExceeded, InvalidRequest, RequestError, RequestFailed
from qwen_ray.core.pooling import Pooling

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_BYTES = 64 * 1024

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How one sequence's thinking looks in token ids: a block from `start_id` to `end_id`, one or several of them.

    `ending` ends a block whose budget is spent; `end_id` is in it. `starts_open`: the prompt ends inside a block.
    """

    start_id: int
    end_id: int
    ending: tuple[int, ...]
    starts_open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What one sequence may say: all of its text matches, or would with more tokens.

    `text` is the schema as JSON, the regular expression, the choices as a JSON list of strings, or the grammar; that of
    "json_object" is empty. `after_thinking`: a block of `SamplingParams.thinking` may come first, and is no part of it.
    Raises InvalidRequest for a text too long; whether it means anything is not known here.
    """

    kind: GrammarKind
    text: str = ""
    after_thinking: bool = False

    def __post_init__(self) -> None:
        name = f"a grammar of the kind {self.kind}"
        try:
            num_bytes = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{name} must not hold lone surrogates.", param="structured_outputs") from error
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(
                f"{name} must have at most {MAX_GRAMMAR_BYTES} bytes, got {num_bytes}.", param="structured_outputs"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; names and meanings are those of OpenAI and vLLM.

    `n` and `stop` belong to the text side: an engine sees one sequence and ids only. `thinking_budget` is Qwen's: so
    many tokens may be thought, in all blocks together, before a block is ended by force. It holds once the text side,
    which knows the model's tokens, has filled in `thinking`. Raises InvalidRequest, naming the field, for a value out
    of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, multiplicative (CTRL, Keskar et al. 2019)
    presence_penalty: float = 0.0  # over the output only
    frequency_penalty: float = 0.0  # over the output only
    logit_bias: dict[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None  # None: up to the model's context
    min_tokens: int = 0
    logprobs: int | None = None  # how many alternatives beside the chosen token; 0: the chosen one only
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    thinking_budget: int | None = None
    thinking: Thinking | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        in_range = [
            ("n", self.n, 1, MAX_CHOICES),
            ("temperature", self.temperature, 0.0, 2.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("top_k", self.top_k, -1, 2**31 - 1),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 1e3),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("seed", self.seed, -(2**63), 2**64 - 1),
            ("max_tokens", self.max_tokens, 1, 2**31 - 1),
            ("min_tokens", self.min_tokens, 0, 2**31 - 1),
            ("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS),
            ("thinking_budget", self.thinking_budget, 0, 2**31 - 1),
        ]
        for name, value, low, high in in_range:
            if value is not None and not low <= value <= high:  # NaN is in no range
                raise InvalidRequest(f"{name} must be between {low} and {high}, got {value}.", param=name)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be above 0, got 0.", param="top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).", param="min_tokens"
            )
        if len(self.stop) > MAX_STOP_STRINGS or "" in self.stop:
            raise InvalidRequest(f"stop must hold at most {MAX_STOP_STRINGS} non-empty strings.", param="stop")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias must hold at most {MAX_LOGIT_BIAS} entries.", param="logit_bias")
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequest(
                    f"logit_bias values must be between -100 and 100, got {bias} for token {token}.",
                    param="logit_bias",
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to be continued.

    `seed` is always set: whoever accepts a request draws one if the user gave none, so that a hand-over samples the
    same tokens. `output_token_ids` are tokens generated before (by a replica that died, say); they are continued,
    never sent again. `stop_token_ids` is the whole set that ends the sequence, the model's end tokens included.

    `priority` decides first, then the fair share of the `tenant`: of two tenants with work waiting, one of `weight` 2
    is served twice the tokens of one of weight 1. After the `deadline` it ends: with what it has, as "length", or, if
    that is nothing, with DeadlineExceeded. `is_suspect`: replicas have died under it; it runs alone from the start, and
    an empty delta tells when that is. With `pooling` nothing is generated: it ends, as "stop", when its
    prompt is computed.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    priority: int = 0  # lower runs first, as in vLLM
    arrival: float = 0.0  # seconds since the epoch, for turns and queue times
    tenant: str = ""
    weight: float = 1.0  # above 0
    deadline: float | None = None  # seconds since the epoch, by the replica's clock
    is_suspect: bool = False
    pooling: Pooling | None = None

    def choices(self) -> list[GenerateRequest]:
        """The `sampling.n` single-sequence requests of this one, ids `ID-0`, `ID-1`, …, each with a seed of its own."""
        alone = replace(self.sampling, n=1)
        return [
            replace(self, request_id=f"{self.request_id}-{i}", sampling=alone, seed=mix_seed(self.seed, i))
            for i in range(self.sampling.n)
        ]

    def resumed(self, output_token_ids: tuple[int, ...]) -> GenerateRequest:
        """The same request with all that has been generated so far: what is handed to another replica."""
        return replace(self, output_token_ids=output_token_ids)


def mix_seed(seed: int, index: int) -> int:
    """An independent 63-bit seed for choice `index`; choice 0 keeps the seed (splitmix64, Steele et al. 2014)."""
    if index == 0:
        return seed & (2**63 - 1)
    z = (seed + index * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & (2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution (before temperature and penalties).

    `logprob` is the chosen token's; `top` the most likely (token id, logprob) pairs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """What one step adds to one request. The last one, and only the last, has a finish reason.

    `logprobs` runs parallel to `token_ids` when asked for. `prompt_logprobs` comes once, with the first delta: one
    entry per prompt token but the first. `stop_token_id` is the token that ended it. `error` goes with "error";
    `code` says in one word why it ended where the finish reason does not ("deadline_exceeded" with "length", say).
    `pooled` is what `GenerateRequest.pooling` asks for: little-endian float32.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0  # prompt tokens that a prefix hit saved; on the first delta
    scheduled: float = 0.0  # seconds since the epoch, when it left the queue; on the first delta
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    code: str | None = None
    pooled: bytes = b""

    def to_error(self) -> RequestError:
        """What a delta with finish reason "error" means to whoever asked."""
        message = self.error or "The engine failed while running this request."
        if self.code == DEADLINE_EXCEEDED:
            return DeadlineExceeded(message)
        return RequestFailed(message, code=self.code)
