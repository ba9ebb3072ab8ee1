"""OpenVINO GenAI: its continuous batching with prefix caching, behind a server of the benchmark's own.

Exported by optimum-intel. Computed in bf16 where the processor has it, with an 8-bit KV cache: its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO

from benchmarks.peers import checkpoint, environments, place
from benchmarks.peers.peer import KV_GIB, Launch

ENVIRONMENT = "openvino"
WEIGHTS = {
    "bf16": (),
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"),
}
FORMATS = {"bf16": "bf16", "int8": "int8 asym", "int4": "int4 asym g64"}


class OpenVino:
    name = "openvino"
    formats: Mapping[tuple[str, str], str] = {(model, p): f for model in ("dense", "moe") for p, f in FORMATS.items()}

    def version(self) -> str:
        return environments.pinned(ENVIRONMENT, "openvino-genai")

    def prepare(self, model: str, precision: str, log: IO[bytes]) -> None:
        python = environments.make(ENVIRONMENT, log)
        target = place.converted(model, f"openvino-{precision}")
        if not target.exists():
            with place.made_whole(target) as folder:
                export = [python.with_name("optimum-cli"), "export", "openvino", "-m", checkpoint.make(model)]
                options = ["--task", "text-generation-with-past", *WEIGHTS[precision], folder]
                place.run([*export, *options], log=log, HF_HUB_OFFLINE="1", DO_NOT_TRACK="1")

    def launch(self, model: str, precision: str, port: int) -> Launch:
        folder = place.converted(model, f"openvino-{precision}")
        server = (str(environments.python(ENVIRONMENT)), "-m", "benchmarks.peers.openvino_server")
        return Launch(
            arguments=(*server, str(folder), str(port), str(KV_GIB)),
            model=model,
            environment={"PYTHONPATH": str(place.ROOT)},
        )
