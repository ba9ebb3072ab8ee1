"""Strings ↔ token ids for one model, from a directory or a GGUF file.

Knows ids, their bytes, which of them are special, end a text or mark thinking, and the chat template. Stateless once
loaded: every method may be called from several threads at once. Streams are detokenizer.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from qwen_ray.core.errors import CheckpointError, InvalidRequest
from qwen_ray.core.request import SamplingParams, Thinking
from qwen_ray.text.byte_vocabulary import byte_vocabulary
from qwen_ray.text.chat import ChatTemplate
from qwen_ray.text.directory_tokenizer import read_directory_vocabulary
from qwen_ray.text.fill_in import FillIn
from qwen_ray.text.gguf_tokenizer import read_gguf_vocabulary
from qwen_ray.text.qwen_markup import THINK_END, THINK_START
from qwen_ray.text.tool_calls import CALL_TAGS, ToolSyntax, tool_syntax
from qwen_ray.text.vocabulary import Vocabulary

# Qwen's own words for a block whose budget is spent (Qwen3 Technical Report, section 4.3, and its documentation).
OUT_OF_BUDGET = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{THINK_END}\n\n"
)


class Tokenizer:
    """`thinking` is None for a model that does not think: its chat template or its vocabulary has no `</think>`.

    `tool_syntax` is None for a model that calls no tools: its chat template shows no call. `fill_in` is None for one
    whose vocabulary has no tokens for that.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        backend = vocabulary.backend
        self._backend = backend
        self._chat = ChatTemplate(vocabulary.chat_templates, vocabulary.special_tokens)
        self._to_bytes = _bytes_rule(backend)
        self._bytes: dict[int, bytes] = {}  # filled as ids turn up
        self.eos_token_ids = vocabulary.eos_token_ids
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        special = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.special_tokens = dict(vocabulary.special_tokens)  # role to text
        self.fill_in = FillIn.find(backend.token_to_id)
        self.thinking = self._find_thinking()
        self.tool_syntax: ToolSyntax | None = tool_syntax(self._chat.speaks_of)
        # Some checkpoints call these special; they are needed in the text.
        tags = [self.thinking.start_id, self.thinking.end_id] if self.thinking else []
        tags += [i for tag in CALL_TAGS if self.tool_syntax and (i := backend.token_to_id(tag)) is not None]
        self.special_token_ids = special.difference(tags)

    @classmethod
    def load(cls, path: Path, load_format: str = "auto") -> Tokenizer:
        """From a directory with tokenizer.json, or a .gguf file. Raises CheckpointError if there is none to be had.

        Dummy weights need no file but config.json: without a tokenizer.json they speak bytes.
        """
        if load_format == "dummy" and not (path / "tokenizer.json").is_file() and path.suffix != ".gguf":
            return cls(byte_vocabulary(_BYTE_OF))
        if path.is_dir():
            return cls(read_directory_vocabulary(path))
        if path.suffix == ".gguf":
            return cls(read_gguf_vocabulary(path))
        raise CheckpointError(f"{path}: neither a directory nor a .gguf file.")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Any text at all. Special tokens written out in `text` become their ids, as in transformers.

        `add_special_tokens` adds what the model wants at the start (a BOS); a rendered chat brings its own, so False
        there. Takes about a second per megabyte; whoever takes text from outside limits it first.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # lone surrogates, which JSON can spell and UTF-8 cannot
            repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._backend.encode(repaired, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Ids outside the vocabulary count as empty; bytes that are not UTF-8 become U+FFFD."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset[int]()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text: perhaps part of a character; b"" for an id that stands for nothing."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        return self._bytes.setdefault(token_id, self._to_bytes(token))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """OpenAI messages as the prompt that the model was trained on. `variables` are the template's own switches.

        Raises InvalidRequest: no template, a part that is not text, or the template refuses.
        """
        return self._chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    @property
    def chat_template(self) -> str | None:
        return self._chat.default_text

    def thinking_after(self, prompt_token_ids: Sequence[int]) -> Thinking | None:
        """`thinking` of an answer to this prompt: open if the prompt ends with `<think>` and white space."""
        if self.thinking is None:
            return None
        return replace(self.thinking, starts_open=self._last_visible(prompt_token_ids) == self.thinking.start_id)

    def with_thinking(self, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> SamplingParams:
        """`sampling` in this model's tokens. Raises InvalidRequest: a thinking budget, and the model does not think."""
        if self.thinking is None and sampling.thinking_budget is not None:
            raise InvalidRequest(
                f"thinking_budget is {sampling.thinking_budget}, but this model does not think: its chat template "
                f"or its vocabulary has no {THINK_END}. Leave it out.",
                param="thinking_budget",
            )
        thinking = self.thinking_after(prompt_token_ids)
        grammar = sampling.grammar
        if grammar is not None and grammar.after_thinking:
            # After a block that the prompt has closed, there is no other.
            may_think = thinking is not None and self._last_visible(prompt_token_ids) != thinking.end_id
            grammar = replace(grammar, after_thinking=may_think)
        return replace(sampling, thinking=thinking, grammar=grammar)

    def _last_visible(self, token_ids: Sequence[int]) -> int | None:
        """The last token that is not white space."""
        return next((i for i in reversed(token_ids) if self.token_bytes(i).strip()), None)

    def _find_thinking(self) -> Thinking | None:
        start_id, end_id = (self._backend.token_to_id(tag) for tag in (THINK_START, THINK_END))
        if start_id is None or end_id is None or not self._chat.speaks_of(THINK_END):
            return None
        ending = tuple(self.encode(OUT_OF_BUDGET, add_special_tokens=False))
        return Thinking(start_id=start_id, end_id=end_id, ending=ending)


def _bytes_rule(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How a token's name spells its bytes, found out by asking the decoder."""
    decoder = backend.decoder
    if decoder is not None and decoder.decode(["Ġ"]) == " ":
        return _byte_level
    if decoder is not None and decoder.decode(["a", "<0x41>", "▁"]) == "aA ":
        return _byte_fallback
    raise CheckpointError("the tokenizer is neither byte-level BPE nor SentencePiece with byte fallback.")


def _byte_level(token: str) -> bytes:
    # As in tokenizers: a token with any character that stands for no byte is meant literally.
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for 256, 257, … in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + rank): b for rank, b in enumerate(others)}


_BYTE_OF = _byte_characters()
