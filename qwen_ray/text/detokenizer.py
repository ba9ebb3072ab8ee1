"""Token ids → text, as they come: whole characters only, each token looked at once.

Bytes go through an incremental UTF-8 decoder, so the pushes joined are the decoding of the whole, whatever the split.
Bytes that no continuation can make a character become U+FFFD as soon as that is certain, an unfinished one at the end.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from qwen_ray.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes of UTF-8, so at most as many tokens


class IncrementalDetokenizer:
    """Of one sequence. `prompt_token_ids` matters where a prompt ends within a character: the output completes it."""

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_output = False
        self._decoder.decode(b"".join(map(self._token_bytes, prompt_token_ids[-_LONGEST_CHARACTER:])))

    def push(self, token_ids: Iterable[int]) -> str:
        """What these tokens add to the text; "" while a character is unfinished."""
        added = b"".join(self._token_bytes(i) for i in token_ids if i not in self._skipped)
        self._has_output = self._has_output or bool(added)
        return self._decoder.decode(added)

    def finish(self) -> str:
        """The end of the text: U+FFFD if it breaks off within a character, else ""."""
        return self._decoder.decode(b"", final=True) if self._has_output else ""
