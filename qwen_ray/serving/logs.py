"""What log lines of ours look like, from which level on they are written, and where: stderr, which Ray keeps in files.

Much of what is logged was written by clients: control characters are shown escaped, so that nobody can forge a line or
drive a terminal, and what looks like a secret is blotted out.
"""

from __future__ import annotations

import logging
import re
import sys

SECRET = re.compile(
    r"(?i)(\bbearer\s+|\b(?:authorization|api[_-]?key|secret|password|token)[\"']?\s*[=:]\s*[\"']?)(?!bearer\b)[^\s\"',;}]{4,}"
    r"|\b(?:qr|sk|hf)[-_][A-Za-z0-9_-]{16,}"
)
# C0, DEL, C1, line and paragraph separators, marks that turn the direction of text, lone surrogates.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), redacted(text))


def redacted(text: str) -> str:
    return SECRET.sub(lambda found: f"{found[1] or ''}[redacted]", text)


class LineFormatter(logging.Formatter):
    """A record is one line; those of a traceback follow, indented, so that none of them looks like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        return _indented(super().formatException(ei))  # pyright: ignore[reportArgumentType]

    def formatStack(self, stack_info: str) -> str:
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(f"  {one_line(line)}" for line in text.split("\n"))


def handler(process: str) -> logging.Handler:
    """`process` stands in every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s"))
    return handler


def configure_logs(level: str, process: str) -> None:
    """For loggers of ours; Ray's and Serve's own stay as they are."""
    ours = logging.getLogger("qwen_ray")
    ours.handlers = [handler(process)]
    ours.setLevel(level.upper())
    ours.propagate = False
