"""A stand-in for models that have no tokenizer because they have no weights either: one token for each byte.

Token i is byte i. Models with a vocabulary below 256 cannot say all of them.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qwen_ray.text.vocabulary import Vocabulary

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_vocabulary(alphabet: dict[str, int]) -> Vocabulary:
    """`alphabet` maps the characters of byte-level BPE to their bytes."""
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Vocabulary(backend=backend, eos_token_ids=(), chat_templates={"default": CHAT_TEMPLATE})
