"""Our kernels in C++: compiled on first use for the instructions that this machine has, kept, and loaded.

Some ten seconds of `g++` for the sources beside this file, on all cores; the result lies in `built/` beside them, or
under `~/.cache/qwen-ray/kernels` where that cannot be written, under a name made of the instruction set and a hash of
sources and flags. Why so, and not at `pip install`:

* `pip install` never needs a compiler and never fails for the want of one: without `g++`, torch's own kernels are used,
  and the log says so once. What is built later is found at the next start.
* The kernels have a plain C interface over ctypes: no headers of torch, so no builds for each of its versions, and a
  call costs some microseconds. With torch's CPU builds OpenMP is the one that torch has loaded, threads included.
* Machines of a cluster may differ: each builds or finds its own, also where they share a file system.
* `make install` and an image's build call `python -m qwen_ray.kernels.cpu.library [--all]` so that nobody waits later;
  `--all` builds every instruction set, for an image that is used on machines other than the one that builds it.

An instruction set is a row of `VARIANTS`; AMX would be one more, with kernels of its own for the products of many rows.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
COMPILERS = ("g++", "c++")
COMPILE_SECONDS = 300  # then it is given up
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]
CPU_INFO = Path("/proc/cpuinfo")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One instruction set: what Linux must list as a processor's flags or vendor, and how to compile for it."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(repr((FLAGS, self.flags)).encode())
        for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
            digest.update(source.read_bytes())
        return f"kernels-{self.name}-{digest.hexdigest()[:16]}.so"


AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
VARIANTS = (  # the best first
    Variant(  # on others, products of pairs are slower than of what is widened
        name="avx512-bf16",
        needs=AVX512 | {"avx512_vnni", "avx512_bf16", "AuthenticAMD"},
        flags=("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mprefer-vector-width=512"),
    ),
    Variant(
        name="avx512-vnni",
        needs=AVX512 | {"avx512_vnni"},
        flags=("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
    ),
    Variant(name="avx512", needs=AVX512, flags=("-march=x86-64-v4", "-mprefer-vector-width=512")),
    Variant(name="avx2", needs=AVX2, flags=("-march=x86-64-v3",)),
)


def processor_flags() -> frozenset[str]:
    """And its vendor. Empty where this is no Linux on x86-64."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    lines = re.findall(r"^(?:flags|vendor_id)\s*:(.*)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset(word for line in lines[:2] for word in line.split())


@cache
def load() -> Library | None:
    """The library for this machine, built if need be; None: there is none, and the log has said why."""
    flags = processor_flags()
    variant = next((v for v in VARIANTS if v.needs <= flags), None)
    if variant is None:
        logger.info("no kernels of our own for this processor: torch's are used")
        return None
    return open_library(variant, has_amx="amx_bf16" in flags)


def open_library(variant: Variant, *, has_amx: bool = False) -> Library | None:
    """As `load`, for any variant that this machine can run."""
    try:
        return Library(find(variant) or build(variant), has_amx=has_amx)
    except (BuildError, OSError) as error:
        logger.warning("torch's kernels are used in place of our own, which are faster: %s", error)
        return None


class Library:
    """The functions of one built file, by name. They let other Python threads run while they compute."""

    def __init__(self, file: Path, *, has_amx: bool = False) -> None:
        """Raises OSError."""
        self.name = file.stem
        self.has_amx = has_amx  # whether torch has something faster for many rows of bfloat16
        self._functions = ctypes.CDLL(str(file))
        self._short = ctypes.PyDLL(str(file))

    def function(self, name: str, arguments: str, *, is_short: bool = False) -> Callable[..., None]:
        """`arguments`: one letter each: p a pointer, n a 64-bit integer, i an int, f a float.

        `is_short`: keep the interpreter's lock, it would take longer to get back.
        """
        function: Any = getattr(self._short if is_short else self._functions, name)
        function.argtypes = [TYPES[letter] for letter in arguments]
        function.restype = None
        return function


TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


class BuildError(Exception):
    """Why there is no library."""


def folders() -> list[Path]:
    """Where built libraries may lie; the first that can be written to is where they are put."""
    return [SOURCES / "built", Path("~/.cache/qwen-ray/kernels").expanduser()]


def find(variant: Variant) -> Path | None:
    return next((file for folder in folders() if (file := folder / variant.file_name).is_file()), None)


def build(variant: Variant) -> Path:
    """Compile, unless another process has just done so: one at a time. A file appears whole or not at all.

    Raises BuildError.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError("there is no C++ compiler (Debian, Ubuntu: apt-get install g++).")
    errors: list[str] = []
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / variant.file_name
            with _locked(folder):
                if not file.is_file():
                    with tempfile.TemporaryDirectory(dir=folder) as room:
                        _compile(compiler, variant, Path(room) / "kernels.so").replace(file)
            return file
        except OSError as error:
            errors.append(str(error))
    raise BuildError(f"nowhere to put what is compiled: {'; '.join(errors)}.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network's file system may have no such lock: then several compile
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)  # which lets go


def _compile(compiler: str, variant: Variant, target: Path) -> Path:
    begun = time.perf_counter()
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    flags = [*FLAGS, *variant.flags]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for made in [
            pool.submit(_run, compiler, *flags, "-c", "-o", to, source)
            for source, to in zip(sources, objects, strict=True)
        ]:
            made.result()
    _run(compiler, *flags, "-shared", "-o", target, *objects)
    logger.info("compiled kernels for %s in %.1f s", variant.name, time.perf_counter() - begun)
    return target


def _run(*command: str | Path) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {COMPILE_SECONDS} s.") from error
    if answer.returncode != 0:
        raise BuildError(f"{command[0]} failed: {answer.stderr.strip()[-500:]}")


def main() -> None:
    """Build what is missing; says what there is, and never fails: kernels can be done without."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels now rather than at the first start.")
    parser.add_argument("--all", action="store_true", help="for every instruction set, not only this machine's")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if parser.parse_args().all:
        for variant in VARIANTS:
            try:
                logger.info("%s", find(variant) or build(variant))
            except BuildError as error:
                logger.warning("%s", error)
    elif load():
        logger.info("CPU kernels are ready")


if __name__ == "__main__":
    main()
