"""The two files of a batch, in OpenAI's format: requests, one a line, and their answers, each written once.

Knows lines and `custom_id`s; not what is asked, nor who answers. What cannot be told apart or cannot be read is refused
with the numbers of the lines, before anything is started; what is wrong with a request itself is its own answer.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qwen_ray.core.errors import QwenRayError

MAX_SHOWN = 10  # wrong lines
LOCK_SECONDS = 60.0  # one that was killed a moment ago may still hold the file
LOCK_POLL_SECONDS = 0.2
ANSWER_BEGINS = b'{"id": "batch_req_'


class BadBatch(QwenRayError):
    """A file that cannot be worked with; the message names its lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """One request: `text` is its line, JSON as the client wrote it."""

    number: int  # in the file, from 1
    custom_id: str
    text: str


def read_requests(path: Path) -> list[BatchLine]:
    """Empty lines are passed over. Raises BadBatch."""
    lines: list[BatchLine] = []
    seen: dict[str, int] = {}
    wrong: list[str] = []
    for number, data in _lines(path):
        try:
            text = data.decode()
            custom_id = _custom_id(text)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
            continue
        if custom_id in seen:
            wrong.append(f"line {number}: custom_id {custom_id!r} is line {seen[custom_id]}'s already")
            continue
        seen[custom_id] = number
        lines.append(BatchLine(number=number, custom_id=custom_id, text=text))
    if wrong:
        more = f"; and {len(wrong) - MAX_SHOWN} lines more" if len(wrong) > MAX_SHOWN else ""
        raise BadBatch(f"{path}: {'; '.join(wrong[:MAX_SHOWN])}{more}. Nothing has been answered.")
    return lines


class Answers:
    """The output file while it grows: locked, and what is in it stays, less a last line that was torn off.

    `with Answers(path) as answers`. Raises BadBatch.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: IO[bytes] = path.open("ab+")
        except OSError as error:
            raise BadBatch(f"{path}: cannot be written: {error.strerror}.") from error
        self.num_failed = 0  # of those in it
        try:
            self._lock(path)
            self.custom_ids = self._known(path)
        except BaseException:
            self._file.close()
            raise

    def check(self, requests: Iterable[BatchLine], path: Path) -> None:
        """Raises BadBatch when the file answers something else."""
        strangers = self.custom_ids - {request.custom_id for request in requests}
        if strangers:
            raise BadBatch(
                f"{path} has answers to requests that are not in the input, such as custom_id {min(strangers)!r}. "
                "Name another output, or the input that it belongs to."
            )

    def add(self, lines: Mapping[str, str]) -> None:
        """By custom_id; they are on the disk when this returns."""
        self._file.write(b"".join(line.encode() + b"\n" for line in lines.values()))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.custom_ids.update(lines)
        self.num_failed += sum(map(_has_failed, lines.values()))

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _lock(self, path: Path) -> None:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise BadBatch(f"{path} is being written by another batch.") from None
                time.sleep(LOCK_POLL_SECONDS)

    def _known(self, path: Path) -> set[str]:
        """Raises BadBatch for a file that no batch has written: none of it is cut off."""
        self._file.seek(0)
        known: set[str] = set()
        end = 0  # of what is whole
        for number, data in enumerate(self._file, 1):
            is_ours = data.startswith(ANSWER_BEGINS)
            if is_ours and data.endswith(b"\n"):
                known.add(_custom_id(data.decode()))
                self.num_failed += _has_failed(data)
                end += len(data)
            elif not is_ours and not ANSWER_BEGINS.startswith(data):
                raise BadBatch(f"{path}: line {number} is no answer of a batch. Name another output.")
        self._file.truncate(end)
        return known


def answer_line(custom_id: str, response: Mapping[str, Any]) -> str:
    """One line of the output, without its end. `response`: status_code, request_id, body."""
    answer = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(answer)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                data = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
                if data.strip():
                    yield number, data.strip()
    except OSError as error:
        raise BadBatch(f"{path}: cannot be read: {error.strerror}.") from error


def _has_failed(answer: str | bytes) -> bool:
    return json.loads(answer)["response"]["status_code"] >= 400


def _custom_id(text: str) -> str:
    """Raises ValueError, saying what is wrong."""
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object with custom_id, method, url and body")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id must be a string that is not empty, got {json.dumps(custom_id)[:40]}")
    return custom_id
