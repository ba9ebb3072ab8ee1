"""Which tokens may come next: a grammar over one model's vocabulary, by llguidance.

Knows token ids and their bytes; nothing of logits, of requests, or of when a sequence ends. What may come next depends
on the grammar and the tokens so far alone, so a matcher is rebuilt by adding the same tokens again. All work is bounded
by fuel, not by time: what is refused is refused everywhere.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from qwen_ray.core.errors import InvalidRequest, RequestFailed
from qwen_ray.core.request import Grammar
from qwen_ray.grammar.lark import to_lark
from qwen_ray.text.tokenizer import Tokenizer

MAX_KEPT = 64  # compiled grammars
MAX_SHOWN = 300  # characters of llguidance's own words in an error

# Fuel and items are of one mask: 4 ms of work by llguidance's own figures (14,000 and 20,000 a millisecond).
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_items_in_row=1_000,
    max_lexer_states=50_000,  # of 1 to 2 KB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
_SOURCE = re.compile(r"\n\s*1 \|.*", re.DOTALL)  # it shows the whole grammar again
_WHERE = re.compile(r"^at \d+\(\d+\): ")


class Matcher:
    """One sequence's place in its grammar."""

    __slots__ = ("_end_id", "_matcher")

    def __init__(self, matcher: LLMatcher, end_id: int) -> None:
        self._matcher = matcher
        self._end_id = end_id

    def add(self, token_ids: Iterable[int]) -> None:
        """Raises RequestFailed for a token that was not allowed, or when a limit is reached."""
        if not self._matcher.consume_tokens(list(token_ids)):
            raise _failed(self._matcher)

    def allowed(self) -> tuple[bytearray, bool]:
        """One bit for each token id, lowest first, and whether the text so far is complete.

        At least one token is allowed, or the text is complete. Raises RequestFailed when a limit is reached.
        """
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise _failed(self._matcher)
        is_complete = bool(bits[self._end_id >> 3] & (1 << (self._end_id & 7)))
        bits[self._end_id >> 3] &= ~(1 << (self._end_id & 7))
        return bits, is_complete


class GrammarCompiler:
    """A model's vocabulary, and what was compiled for it lately. Not for several threads at once.

    `num_bytes`: of a mask, which is a whole number of 32-bit words.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's: its logits may be more, or fewer, than the tokenizer has tokens."""
        self.vocab_size = vocab_size
        self._end_id = vocab_size  # a token of its own, which says that the text is complete
        self._vocabulary = LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, vocab_size)))
        self.num_bytes = vocab_size // 32 * 4 + 4
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    @classmethod
    def load(cls, path: Path, load_format: str, vocab_size: int) -> GrammarCompiler:
        """With the tokenizer of a checkpoint. Raises CheckpointError if there is none to be had."""
        return cls(Tokenizer.load(path, load_format), vocab_size)

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the start of a text. Raises InvalidRequest for what is no grammar, or too much of one."""
        compiled = self._kept.pop(grammar, None)
        if compiled is None:
            compiled = LLMatcher(self._vocabulary, to_lark(grammar), log_level=0, limits=LIMITS)
            if compiled.is_error():
                raise InvalidRequest(f"cannot be used: {_own_words(compiled)}", param="structured_outputs")
        self._kept[grammar] = compiled
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return Matcher(compiled.deep_copy(), self._end_id)


class _Tokens:
    """As llguidance asks for a vocabulary. Special tokens are no text: no grammar allows them."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        thinking = tokenizer.thinking
        tags = () if thinking is None else (thinking.start_id, thinking.end_id)
        self.eos_token_id = vocab_size
        self.tokens = [*map(tokenizer.token_bytes, range(vocab_size)), b""]
        self.special_token_ids = [i for i in (*tokenizer.special_token_ids, *tags) if i < vocab_size]

    def __call__(self, _text: bytes) -> list[int]:
        return []  # nothing is ever forced: see `lark._OPTIONS`


def _failed(matcher: LLMatcher) -> RequestFailed:
    words = "nothing may follow" if "NoExtension" in matcher.get_error() else _own_words(matcher)
    return RequestFailed(words, code="grammar_failed")


def _own_words(matcher: LLMatcher) -> str:
    error = matcher.get_error().split("<backtrace>")[0].replace("<non-verbose/>", "")
    words = " ".join(_WHERE.sub("", _SOURCE.sub("", error)).split())
    return words if len(words) <= MAX_SHOWN else words[:MAX_SHOWN] + "…"
