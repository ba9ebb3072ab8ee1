"""What a peer is to the benchmark: something that can be prepared, and launched as a server for one form of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

PRECISIONS = ("bf16", "int8", "int4")
CONTEXT = 4096  # tokens of the longest request; W3 has 2,049
# For everybody's KV cache: W5's requests all at once need 28,000 tokens. 1 GiB holds 87,000 of the dense model in bf16.
KV_TOKENS = 40_960
KV_GIB = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one server is started, and what a request to it says beside the prompt."""

    arguments: Sequence[str]
    model: str  # name that requests give
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    extra_body: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Peer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def formats(self) -> Mapping[tuple[str, str], str]:
        """(model, precision) -> what it is there: the nearest form that the peer has, by its own name."""
        ...

    def version(self) -> str: ...
    def prepare(self, model: str, precision: str, log: IO[bytes]) -> None:
        """Install and convert whatever is missing; what is there is left alone."""
        ...

    def launch(self, model: str, precision: str, port: int) -> Launch: ...
