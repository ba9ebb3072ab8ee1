"""transformers in bf16 with sdpa, behind a server of the benchmark's own: its continuous batching, or `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO

from benchmarks.peers import checkpoint, environments, place
from benchmarks.peers.peer import KV_TOKENS, Launch

ENVIRONMENT = "transformers"


class Transformers:
    """`way` is continuous (the default) or static: `generate` on whatever waits."""

    formats: Mapping[tuple[str, str], str] = {("dense", "bf16"): "bf16", ("moe", "bf16"): "bf16"}

    def __init__(self, name: str, way: str) -> None:
        self.name = name
        self._way = way

    def version(self) -> str:
        return environments.pinned(ENVIRONMENT, "transformers")

    def prepare(self, model: str, precision: str, log: IO[bytes]) -> None:
        environments.make(ENVIRONMENT, log)
        checkpoint.make(model)

    def launch(self, model: str, precision: str, port: int) -> Launch:
        server = (str(environments.python(ENVIRONMENT)), "-m", "benchmarks.peers.transformers_server")
        return Launch(
            arguments=(*server, str(place.checkpoint(model)), str(port), str(KV_TOKENS), self._way),
            model=model,
            environment={"PYTHONPATH": str(place.ROOT), "HF_HUB_OFFLINE": "1"},
        )
