"""Compiling, finding and loading the kernels in C++, with compilers that are a few lines of shell."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen_ray.kernels.cpu import library
from qwen_ray.kernels.cpu.library import AVX2, VARIANTS, BuildError, Variant, build, find, open_library

VARIANT = Variant(name="test", needs=frozenset(), flags=("-mtest",))
WRITES = 'while [ "$1" != -o ]; do shift; done; echo not a library > "$2"'


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(library, "folders", lambda: found)
    return found


def use_compiler(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(library, "COMPILERS", ("no-such-compiler", str(compiler)))


@pytest.mark.skipif(not any(map(shutil.which, library.COMPILERS)), reason="needs a C++ compiler")
@pytest.mark.parametrize("variant", VARIANTS, ids=[variant.name for variant in VARIANTS])
def test_every_instruction_set_compiles(variant: Variant) -> None:
    """One that does not is done without, and tests of what each computes would not miss it."""
    assert (find(variant) or build(variant)).is_file()


def test_what_was_built_is_found_again(places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(WRITES, tmp_path, monkeypatch)
    assert find(VARIANT) is None
    file = build(VARIANT)
    assert file == places[0] / VARIANT.file_name
    assert find(VARIANT) == file
    assert list(places[0].iterdir()) == [file]  # nothing else is left


def test_who_comes_second_waits_for_the_first(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    use_compiler(f"echo >> {calls}; sleep 0.05; {WRITES}", tmp_path, monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(build, [VARIANT] * 3)) == {places[0] / VARIANT.file_name}
    assert len(calls.read_text().splitlines()) == len(list(library.SOURCES.glob("*.cpp"))) + 1


def test_without_locks_each_compiles(places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    use_compiler(WRITES, tmp_path, monkeypatch)
    monkeypatch.setattr(library.fcntl, "flock", no_lock)
    assert build(VARIANT).is_file()


def test_a_folder_that_cannot_be_written_is_passed_over(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(WRITES, tmp_path, monkeypatch)
    places[0].write_text("a file, no folder")
    assert build(VARIANT).parent == places[1]
    places[1].rename(tmp_path / "moved")
    places[1].write_text("neither")
    with pytest.raises(BuildError, match="nowhere to put"):
        build(VARIANT)


def test_without_a_compiler_the_log_says_what_to_install(
    places: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.WARNING):
        assert open_library(VARIANT) is None
    assert "apt-get install g++" in caplog.text


def test_a_compiler_that_fails_is_quoted(places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler("echo unknown option -mtest >&2; exit 1", tmp_path, monkeypatch)
    with pytest.raises(BuildError, match="unknown option -mtest"):
        build(VARIANT)
    use_compiler("exec sleep 10", tmp_path, monkeypatch)
    monkeypatch.setattr(library, "COMPILE_SECONDS", 0.05)
    with pytest.raises(BuildError, match="longer than"):
        build(VARIANT)


def test_a_file_that_is_no_library_is_not_used(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_compiler(WRITES, tmp_path, monkeypatch)
    assert open_library(VARIANT) is None
    assert VARIANT.file_name in caplog.text


def test_names_tell_sources_and_flags_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Variant(name="test", needs=frozenset(), flags=("-mother",))
    assert VARIANT.file_name != other.file_name
    before = VARIANT.file_name
    (tmp_path / "kernel.cpp").write_text("int x;")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    assert VARIANT.file_name != before


def test_the_processor_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(library, "CPU_INFO", info)
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library.platform, "system", lambda: "Linux")
    info.write_text(f"processor\t: 0\nflags\t\t: fpu {' '.join(AVX2)}\n")
    assert [v.name for v in VARIANTS if v.needs <= library.processor_flags()] == ["avx2"]
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    assert library.processor_flags() == frozenset()
