"""qwen-ray itself: the package of this tree, in the environment that runs the benchmark."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import IO

from benchmarks.peers import checkpoint, place
from benchmarks.peers.peer import CONTEXT, KV_GIB, Launch


class QwenRay:
    """`options` are added to `qwen-ray serve`, for a variant of its own name."""

    def __init__(self, name: str = "qwen-ray", *options: str) -> None:
        self.name = name
        self._options = options
        flags = {"bf16": "bf16", "int8": "--quantization int8", "int4": "--quantization int4"}
        self.formats: Mapping[tuple[str, str], str] = {
            (model, precision): label for model in ("dense", "moe") for precision, label in flags.items()
        }

    def version(self) -> str:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=place.ROOT, capture_output=True, text=True
        )
        return told.stdout.strip() or "unknown"

    def prepare(self, model: str, precision: str, log: IO[bytes]) -> None:
        checkpoint.make(model)

    def launch(self, model: str, precision: str, port: int) -> Launch:
        quantization = () if precision == "bf16" else ("--quantization", precision)
        return Launch(
            arguments=(
                *(sys.executable, "-m", "qwen_ray.cli", "serve", str(checkpoint.make(model)), "--dtype", "bfloat16"),
                *("--served-model-name", model, "--port", str(port), "--max-model-len", str(CONTEXT)),
                *("--kv-cache-memory", f"{KV_GIB}GiB", *quantization, *self._options),
            ),
            model=model,
            extra_body={"return_token_ids": True},
        )
