"""Fill-in-the-middle: what stands between a prefix and a suffix, as Qwen's coder models are asked for it.

The sequence is that of Qwen2.5-Coder's documentation, and so are the tokens that end an answer: a file's end, and
whatever would begin another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
ENDS = ("<|endoftext|>", "<|im_end|>", PREFIX, MIDDLE, SUFFIX, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class FillIn:
    """One vocabulary's tokens for it."""

    prefix_id: int
    suffix_id: int
    middle_id: int
    end_ids: tuple[int, ...]

    @staticmethod
    def find(token_id: Callable[[str], int | None]) -> FillIn | None:
        """None for a vocabulary without them."""
        prefix_id, suffix_id, middle_id = map(token_id, (PREFIX, SUFFIX, MIDDLE))
        if prefix_id is None or suffix_id is None or middle_id is None:
            return None
        ends = tuple(i for text in ENDS if (i := token_id(text)) is not None)
        return FillIn(prefix_id=prefix_id, suffix_id=suffix_id, middle_id=middle_id, end_ids=ends)

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        return [self.prefix_id, *prefix, self.suffix_id, *suffix, self.middle_id]
