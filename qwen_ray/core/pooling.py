"""What a model can be asked for beside tokens: a vector for a text, and how well two texts go together.

Knows what is asked of the ranks and the arithmetic on what they answer, which is float32 numbers as bytes. Knows no
prompts, tensors or files.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import mul
from typing import Literal

# What a server is for. "generate" answers with tokens, "embed" with vectors; "score" says how well texts go together,
# which the other two can as well.
Task = Literal["generate", "embed", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """What is asked of a prompt's last position in place of a token to follow it.

    With `token_ids` their logits there, in their order; without, the hidden state behind the model's final norm.
    """

    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingConfig:
    """How a checkpoint wants to be used for embeddings. `prompts`, by name, go before a text."""

    normalizes: bool = True  # vectors have length 1
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    default_prompt_name: str | None = None


def to_floats(pooled: bytes) -> array[float]:
    """Little-endian float32, as they came."""
    values = array("f", pooled)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def shaped(vector: array[float], *, dimensions: int | None = None, normalizes: bool = True) -> array[float]:
    """Its first `dimensions` numbers (Matryoshka: Kusupati et al. 2022), of length 1 if it `normalizes`."""
    vector = vector[:dimensions]
    length = math.sqrt(sum(map(mul, vector, vector)))
    return array("f", (x / length for x in vector)) if normalizes and length else vector


def cosine(a: array[float], b: array[float]) -> float:
    """Of the angle between two vectors; 0 where one of them has no direction."""
    lengths = math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return sum(map(mul, a, b)) / lengths if lengths else 0.0


def sigmoid(x: float) -> float:
    """Of two tokens whose logits are `x` apart, how likely the first one is."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
