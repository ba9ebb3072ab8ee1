"""API keys: what is known of one (never the key itself, only its SHA-256), how one is made, and files of them.

Keys are long random words, so a plain hash of one is safe to keep: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qwen_ray.core.errors import SettingsError

EMPTY_SHA256 = hashlib.sha256().hexdigest()
PREFIX = "qr-"
FORM = "{id: NAME, sha256: HASH}, never the key itself; `qwen-ray key` makes both"


class ApiKey(BaseModel):
    """Who sends it, and what that may take. Rates are those of all ingresses together; None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="name in logs and messages")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key")
    weight: float = Field(default=1.0, gt=0, le=1000, description="share of the tokens when there is not enough")
    priority: int = Field(default=0, description="the most urgent (lowest) that its requests may ask for")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1, description="of prompts and answers together")

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_hash(cls, data: Any) -> Any:
        if isinstance(data, ApiKey):
            return data
        if not isinstance(data, dict) or not isinstance(data.get("sha256"), str):
            raise ValueError(f"a key is {FORM}")
        digest = data["sha256"].lower()
        if digest == EMPTY_SHA256:
            raise ValueError("sha256 is that of an empty key")
        return {"id": f"key-{digest[:8]}", **data, "sha256": digest}

    @classmethod
    def of(cls, key: str, name: str | None = None) -> ApiKey:
        """Raises SettingsError for what no client could send."""
        if not re.fullmatch(r"[!-~]+", key):
            raise SettingsError(
                "An API key must be one word of ASCII characters, and not empty.", field="http.api_keys"
            )
        named = {} if name is None else {"id": name}
        return _checked([{**named, "sha256": hashlib.sha256(key.encode()).hexdigest()}], "API key")[0]


def new_key() -> str:
    """256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def check_distinct(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    """Raises ValueError for two keys with one name or one hash."""
    for field in ("id", "sha256"):
        values = [getattr(key, field) for key in keys]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"two keys with the {field} {min(twice)}")
    return keys


def read_api_keys(file: Path) -> tuple[ApiKey, ...]:
    """A list as in the settings (YAML or JSON, alone or under `api_keys`), or lines `HASH` or `HASH NAME`.

    Raises SettingsError, never with what the file says: it may be a key.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}.", field="http.api_keys_file") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: is not text.", field="http.api_keys_file") from error
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if all(re.fullmatch(r"[0-9A-Fa-f]{64}", line[0]) and len(line) <= 2 for line in lines):
        return _checked([dict(zip(("sha256", "id"), line, strict=False)) for line in lines], str(file))
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        data = None
    entries = data.get("api_keys") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise SettingsError(f"{file}: must hold keys, each {FORM}.", field="http.api_keys_file")
    return _checked(entries, str(file))


def _checked(entries: Sequence[Any], origin: str) -> tuple[ApiKey, ...]:
    keys: list[ApiKey] = []
    for number, entry in enumerate(entries):
        try:
            keys.append(ApiKey.model_validate(entry))
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(str(part) for part in (number, *first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{origin}: {where}: {message}.", field="http.api_keys") from None
    try:
        return check_distinct(tuple(keys))
    except ValueError as error:
        raise SettingsError(f"{origin}: {error}.", field="http.api_keys") from error
