"""Ray's GCS dies and comes back with what it had stored: nobody who is served notices."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from place import Place, wait_until

from qwen_ray.commands.ports import free_ports

pytestmark = pytest.mark.chaos


@pytest.fixture(params=["redis", "rocksdb"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Whose GCS keeps its state there."""
    redis = None
    if request.param == "redis":
        if shutil.which("redis-server") is None:
            pytest.skip("needs redis-server")
        (port,) = free_ports(1)
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
        redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        storage = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}
    else:
        storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    place = Place(tmp_path, **storage)
    try:
        place.start()
        yield place
    finally:
        place.close()
        if redis is not None:
            redis.terminate()
            redis.wait()


async def test_the_gcs_dies_and_comes_back(place: Place) -> None:
    async def blow() -> None:
        await place.do("restart_gcs", 3.0)
        await asyncio.sleep(5.0)

    verdict = await place.under_load(blow)
    assert verdict.is_clean, str(verdict)

    async def kill_a_replica() -> None:
        (replica,) = place.replicas()
        os.kill(replica["pid"], signal.SIGKILL)
        await wait_until(lambda: replica["pid"] not in [other["pid"] for other in place.replicas()])
        await wait_until(place.is_ready)

    verdict = await place.under_load(kill_a_replica)  # the new one knows what the old one knew
    assert verdict.is_clean, str(verdict)
