"""Who may come in: the keys of the settings and of their file, which is read again when it changes.

Knows hashes of keys only. Every look-up compares with all keys in the same way, so that how long it takes says nothing
about which one matched, or whether one did.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from qwen_ray.api_keys import ApiKey, read_api_keys
from qwen_ray.config import HttpSettings
from qwen_ray.core.errors import SettingsError, Unauthorized
from qwen_ray.serving.limits import Meter

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks at the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whoever sent a request: a key, or anybody where no key is asked for."""

    id: str = ""
    weight: float = 1.0
    priority: int | None = None  # the most urgent that it may ask for; None: any
    meter: Meter | None = None


ANYBODY = Caller()


@dataclass(slots=True)
class _Known:
    digest: bytes
    key: ApiKey
    caller: Caller


class KeyRing:
    def __init__(self, settings: HttpSettings) -> None:
        """Raises SettingsError when the file cannot be read or holds something else."""
        self._settings = settings
        self._file = _Watched(settings.api_keys_file) if settings.api_keys_file else None
        self._known: list[_Known] = []
        self._take((*settings.api_keys, *(self._file.read() if self._file else ())))

    @property
    def is_needed(self) -> bool:
        """Also with an empty file: who has revoked the last key does not mean to let everybody in."""
        return bool(self._settings.api_keys) or self._file is not None

    def caller(self, authorization: bytes) -> Caller:
        """Of an Authorization header, b"" if there is none. Raises Unauthorized."""
        if not self.is_needed:
            return ANYBODY
        self._look()
        scheme, _, presented = authorization.partition(b" ")
        digest = hashlib.sha256(presented.strip() if scheme.lower() == b"bearer" else b"").digest()
        found: Caller | None = None
        for known in self._known:
            is_it = hmac.compare_digest(digest, known.digest)
            found = known.caller if is_it else found
        if found is None:
            raise Unauthorized
        return found

    def _look(self) -> None:
        if self._file is None or not self._file.has_changed():
            return
        try:
            keys = self._file.read() if self._file.path.exists() else ()
        except SettingsError as error:
            # A slip of the pen must not lock everybody out.
            logger.error("the API keys stay as they were: %s", error)
            return
        self._take((*self._settings.api_keys, *keys))
        logger.info("%d API keys now, after a change of %s", len(self._known), self._file.path)

    def _take(self, keys: tuple[ApiKey, ...]) -> None:
        """What a key has used of its rates is kept unless it is another key now."""
        before = {known.key: known for known in self._known}
        self._known = [before.get(key) or self._new(key) for key in keys]

    def _new(self, key: ApiKey) -> _Known:
        has_limits = key.requests_per_minute is not None or key.tokens_per_minute is not None
        # The proxy deals requests out evenly, so each ingress allows its part.
        meter = Meter(key, 1 / self._settings.num_ingress) if has_limits else None
        caller = Caller(id=key.id, weight=key.weight, priority=key.priority, meter=meter)
        return _Known(bytes.fromhex(key.sha256), key, caller)


@dataclass(slots=True)
class _Watched:
    path: Path
    _seen: tuple[int, ...] = ()
    _looked: float = 0.0

    def read(self) -> tuple[ApiKey, ...]:
        """Raises SettingsError."""
        self._seen, self._looked = self._mark(), time.monotonic()
        return read_api_keys(self.path)

    def has_changed(self) -> bool:
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        return self._mark() != self._seen

    def _mark(self) -> tuple[int, ...]:
        """Of the file behind all links: mounted secrets change by a link that points elsewhere."""
        try:
            status = self.path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ino, status.st_size
