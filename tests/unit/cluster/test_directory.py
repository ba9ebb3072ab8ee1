"""The directory over a dictionary in place of the GCS, with a clock of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from qwen_ray.cluster import directory as directory_module
from qwen_ray.cluster.directory import LOST_SECONDS, Directory, Entry


class Store:
    """The part of `ray.experimental.internal_kv` that is used."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.is_away = False

    def _internal_kv_put(self, key: str, value: bytes, overwrite: bool, *, namespace: str) -> None:
        self._check()
        self.values[key] = value

    def _internal_kv_get(self, key: bytes, *, namespace: str) -> bytes | None:
        self._check()
        return self.values.get(key.decode())

    def _internal_kv_del(self, key: str, *, namespace: str) -> None:
        self._check()
        self.values.pop(key, None)

    def _internal_kv_list(self, prefix: str, *, namespace: str) -> list[bytes]:
        self._check()
        return [key.encode() for key in self.values if key.startswith(prefix)]

    def _check(self) -> None:
        if self.is_away:
            raise ConnectionError("GCS is away")


class Clock:
    """Monotonic seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(directory_module, "internal_kv", store)
    return store


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(directory_module, "time", clock)
    return clock


@pytest.fixture
async def replica(store: Store, clock: Clock) -> AsyncIterator[Directory]:
    directory = Directory("app")
    yield directory
    store.is_away = False
    await directory.withdraw()


def entry(name: str = "r1", app: str = "app") -> Entry:
    return Entry(kind="replica", id=name, app=app, address="10.0.0.1:7", secret=bytes(range(32)), state="starting")


def names(entries: list[Entry]) -> list[str]:
    return [e.id for e in entries]


async def test_announced_seen_changed_withdrawn(replica: Directory) -> None:
    reader = Directory("app")
    await replica.announce(entry())
    (seen,) = await reader.list("replica")
    assert replace(seen, beat=0) == entry()
    await replica.announce(replace(entry(), state="ready"))
    assert [e.state for e in await reader.list("replica")] == ["ready"]
    assert await reader.list("ingress") == []
    assert await Directory("other").list("replica") == []
    await replica.withdraw()
    assert await reader.list("replica") == []


async def test_an_entry_belongs_to_its_app(replica: Directory) -> None:
    with pytest.raises(ValueError, match="'other'"):
        await replica.announce(entry(app="other"))


async def test_dead_process_is_left_out_and_removed(replica: Directory, store: Store, clock: Clock) -> None:
    await replica.announce(entry())
    reader = Directory("app")
    for _ in range(int(LOST_SECONDS) + 1):
        assert names(await reader.list("replica")) == ["r1"]
        clock.now += 1
    assert await reader.list("replica") == []
    assert store.values == {}


async def test_beating_process_stays(replica: Directory, store: Store, clock: Clock) -> None:
    reader = Directory("app")
    for _ in range(3 * int(LOST_SECONDS)):
        await replica.announce(entry())
        assert names(await reader.list("replica")) == ["r1"]
        clock.now += 1


async def test_time_without_looking_is_not_held_against_anyone(replica: Directory, clock: Clock) -> None:
    await replica.announce(entry())
    reader = Directory("app")
    assert names(await reader.list("replica")) == ["r1"]
    clock.now += 100 * LOST_SECONDS
    assert names(await reader.list("replica")) == ["r1"]


async def test_heartbeat_survives_an_outage(
    replica: Directory, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory_module, "BEAT_SECONDS", 0.01)
    await replica.announce(entry())
    store.is_away = True
    while "heartbeat failed" not in caplog.text:
        await directory_module.asyncio.sleep(0.005)
    store.values.clear()  # the GCS came back empty
    store.is_away = False
    while not store.values:
        await directory_module.asyncio.sleep(0.005)
    assert names(await Directory("app").list("replica")) == ["r1"]
