"""llama.cpp's own server, built with AMX and AVX-512 from the sources inside the sdist of llama-cpp-python.

Debian's GCC 12 builds an AMX path that crashes on 8- and 4-bit weights, so it is clang 16 (`apt-get install clang-16
cmake ninja-build`). Q4_0 is its 4-bit format with AMX kernels; the K formats need rows that 256 divides: 896 is none.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from benchmarks.peers import checkpoint, place
from benchmarks.peers.peer import KV_TOKENS, Launch
from qwen_ray.machine import num_cores

RELEASE = "0.3.36"  # of llama-cpp-python
FOLDER = place.BENCH / "src"
BUILD = FOLDER / "llama-build"
SOURCE = FOLDER / f"llama_cpp_python-{RELEASE}" / "vendor/llama.cpp"
TARGETS = ("llama-server", "llama-quantize")
SWITCHED_ON = (
    *("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AVX_VNNI", "AVX2", "FMA", "F16C", "BMI2"),
    *("AMX_TILE", "AMX_INT8", "AMX_BF16"),
)
OPTIONS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in SWITCHED_ON)),
    *("-DGGML_OPENMP=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
)
FORMATS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


class LlamaCpp:
    name = "llama.cpp"
    formats: Mapping[tuple[str, str], str] = {(model, p): f for model in ("dense", "moe") for p, f in FORMATS.items()}

    def version(self) -> str:
        return f"llama-cpp-python {RELEASE}'s, clang 16, AMX"

    def prepare(self, model: str, precision: str, log: IO[bytes]) -> None:
        _build(log)
        bf16 = _converted(model, log)
        target = _gguf(model, precision)
        if not target.exists():
            with place.made_whole(target) as partial:
                place.run([BUILD / "bin/llama-quantize", bf16, partial, FORMATS[precision], str(num_cores())], log=log)

    def launch(self, model: str, precision: str, port: int) -> Launch:
        threads = str(num_cores())
        return Launch(
            arguments=(
                *(str(BUILD / "bin/llama-server"), "-m", str(_gguf(model, precision)), "--alias", model),
                *("--host", "127.0.0.1", "--port", str(port), "--no-webui", "-t", threads, "-tb", threads),
                *("-c", str(KV_TOKENS), "-np", "32", "-b", "2048", "-ub", "512", "--kv-unified", "-fa", "on"),
            ),
            model=model,
            extra_body={"timings_per_token": True},
        )


def _gguf(model: str, precision: str) -> Path:
    return place.converted(model, f"{FORMATS[precision]}.gguf")


def _converted(model: str, log: IO[bytes]) -> Path:
    target = _gguf(model, "bf16")
    if not target.exists():
        # The project's own environment has all else that the converter imports.
        more = place.environment("llama_cpp_converter")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", more]
        place.run([*pip, "-r", place.PINS / "llama_cpp_converter.txt"], log=log)
        with place.made_whole(target) as partial:
            convert = [sys.executable, SOURCE / "convert_hf_to_gguf.py", checkpoint.make(model), "--outtype", "bf16"]
            place.run([*convert, "--outfile", partial], log=log, PYTHONPATH=f"{SOURCE / 'gguf-py'}:{more}")
    return target


def _build(log: IO[bytes]) -> None:
    if (BUILD / "bin/llama-server").exists() and (BUILD / "bin/llama-quantize").exists():
        return
    for tool in ("clang-16", "clang++-16", "cmake", "ninja"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is missing: apt-get install clang-16 cmake ninja-build")
    archive = FOLDER / f"llama_cpp_python-{RELEASE}.tar.gz"
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
        place.run([*pip, "-d", FOLDER, f"llama-cpp-python=={RELEASE}"], log=log)
    if not SOURCE.exists():
        shutil.unpack_archive(archive, FOLDER, filter="data")
    configure = ["cmake", "-G", "Ninja", "-S", SOURCE, "-B", BUILD, *OPTIONS]
    place.run(configure, log=log, CC="clang-16", CXX="clang++-16")
    place.run(["ninja", "-C", BUILD, f"-j{num_cores()}", *TARGETS], log=log)
