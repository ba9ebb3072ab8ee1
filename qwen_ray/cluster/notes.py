"""One process's last word for others to read, in the GCS's key-value store; nobody need be there to hear it.

Knows how a note is kept; not what it says.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from ray.experimental import internal_kv

from qwen_ray.cluster.directory import NAMESPACE

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One after the other, and not where the caller would wait: a call takes seconds while the GCS restarts.
_writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="notes")


def write_note(app: str, name: str, note: Any) -> None:
    """Soon; in the place of the one before. A note that cannot be written is lost, and logged."""
    _writer.submit(_write, f"{app}/note/{name}", msgspec.msgpack.encode(note))


def read_note(app: str, name: str, kind: type[T]) -> T | None:
    """Blocks. None if there is none; raises Ray's errors while the GCS is away."""
    value = internal_kv._internal_kv_get(f"{app}/note/{name}", namespace=NAMESPACE)
    return None if value is None else msgspec.msgpack.decode(value, type=kind)


def _write(key: str, value: bytes) -> None:
    try:
        internal_kv._internal_kv_put(key, value, True, namespace=NAMESPACE)
    except Exception as error:  # Ray's own, of several kinds: the GCS is away
        logger.warning("%s not written: %s", key, error)
