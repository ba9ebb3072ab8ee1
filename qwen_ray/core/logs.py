"""What log lines of ours look like, from which level on they are written, and where: stderr, which Ray keeps in files.

Much of what is logged was written by clients: control characters are shown escaped, so that nobody can forge a line or
drive a terminal, and what looks like a secret is blotted out. As JSON a record is one line, whatever it holds; more of
its fields come with `extra={"fields": {...}}`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

LogFormat = Literal["text", "json"]

SECRET = re.compile(
    r"(?i)(\bbearer\s+|\b(?:authorization|api[_-]?key|secret|password|token)[\"']?\s*[=:]\s*[\"']?)(?!bearer\b)[^\s\"',;}]{4,}"
    r"|\b(?:qr|sk|hf)[-_][A-Za-z0-9_-]{16,}"
)
# C0, DEL, C1, line and paragraph separators, marks that turn the direction of text, lone surrogates.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Of the HTTP request that this task works for: it stands in every record.
REQUEST_ID: ContextVar[str] = ContextVar("qwen_ray_request_id", default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    level: str = "info"
    format: LogFormat = "text"


def one_line(text: str) -> str:
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), redacted(text))


def redacted(text: str) -> str:
    return SECRET.sub(lambda found: f"{found[1] or ''}[redacted]", text)


class LineFormatter(logging.Formatter):
    """A record is one line; those of a traceback follow, indented, so that none of them looks like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = REQUEST_ID.get()
        record.message = one_line(f"[{request_id}] {record.message}" if request_id else record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        return _indented(super().formatException(ei))  # pyright: ignore[reportArgumentType]

    def formatStack(self, stack_info: str) -> str:
        return _indented(super().formatStack(stack_info))


class JsonFormatter(logging.Formatter):
    """A record is a JSON object in ASCII, on one line, its traceback included. `fields` of ours go before its own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        shown: dict[str, Any] = {
            "time": utc(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        if request_id := REQUEST_ID.get():
            shown["request_id"] = request_id
        shown = getattr(record, "fields", {}) | shown
        if record.exc_info:
            shown["exception"] = redacted(self.formatException(record.exc_info))
        if record.stack_info:
            shown["stack"] = redacted(record.stack_info)
        return json.dumps(shown, ensure_ascii=True, separators=(",", ":"), default=str).replace("\x7f", "\\u007f")


def utc(seconds: float) -> str:
    """Seconds since the epoch as 2026-01-31T12:00:00.000Z."""
    milliseconds = int(seconds * 1000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{whole}.{milliseconds % 1000:03d}Z"


def _indented(text: str) -> str:
    return "\n".join(f"  {one_line(line)}" for line in text.split("\n"))


def handler(process: str, log_format: LogFormat = "text") -> logging.Handler:
    """`process` stands in every line."""
    handler = logging.StreamHandler(sys.stderr)
    text = LineFormatter(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else text)
    return handler


def configure_logs(config: LogConfig, process: str) -> None:
    """For loggers of ours; Ray's and Serve's own stay as they are."""
    ours = logging.getLogger("qwen_ray")
    ours.handlers = [handler(process, config.format)]
    ours.setLevel(config.level.upper())
    ours.propagate = False
