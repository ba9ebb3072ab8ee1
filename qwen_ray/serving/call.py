"""One HTTP request as all that stands around it sees it: who asked, when, and what came of it.

Made by the outermost middleware, carried in the ASGI scope, filled in on the way; the audit log tells of it at the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from qwen_ray.core.errors import DeadlineExceeded, InvalidRequest
from qwen_ray.core.logs import utc
from qwen_ray.serving.keys import ANYBODY, Caller
from qwen_ray.serving.trail import Trail

SCOPE_KEY = "qwen_ray.call"
GRACE_SECONDS = 2.0  # for a replica to end a request at its deadline by itself, with what it has


@dataclass(slots=True, kw_only=True)
class Call:
    """`arrival` and `deadline` in seconds since the epoch. `outcome` is a finish reason or an error's code."""

    method: str
    path: str
    request_id: str = ""
    arrival: float = field(default_factory=time.time)
    caller: Caller = ANYBODY
    model: str = ""
    deadline: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    outcome: str = ""
    answer_id: str = ""  # what the answer calls itself
    trail: Trail = field(default_factory=Trail)
    keeps_contents: bool = False
    request: Any = None  # messages or prompts, where contents are kept
    answers: dict[int, str] = field(default_factory=dict[int, str])  # by choice

    @staticmethod
    def of(scope: Scope) -> Call:
        return scope[SCOPE_KEY]

    def limit(self, timeout: float | None, priority: int) -> None:
        """What the body asks for. Raises InvalidRequest when the key may not."""
        if timeout is not None:
            self.deadline = self.arrival + timeout
        highest = self.caller.priority
        if highest is not None and priority < highest:
            raise InvalidRequest(
                f"priority must be at least {highest} with this key, got {priority}.", param="priority"
            )

    def asks(self, num_tokens: int) -> None:
        """With prompts of so many tokens. Raises RateLimited."""
        if self.caller.meter is not None:
            self.caller.meter.prompt(num_tokens)
        self.num_prompt_tokens += num_tokens

    def gets(self, choice: int, num_tokens: int, text: str) -> None:
        self.num_output_tokens += num_tokens
        if self.caller.meter is not None:
            self.caller.meter.answer(num_tokens)
        if self.keeps_contents:
            self.answers[choice] = self.answers.get(choice, "") + text

    @property
    def patience(self) -> float | None:
        """Seconds after which nobody waits for a replica any longer; None: as long as it takes."""
        return None if self.deadline is None else max(0.0, self.deadline + GRACE_SECONDS - time.time())

    def too_late(self) -> DeadlineExceeded:
        assert self.deadline is not None
        return DeadlineExceeded(f"The request's timeout of {round(self.deadline - self.arrival, 3):g} s has passed.")

    def record(self, status: int | None) -> dict[str, Any]:
        """For the audit log; `status` is None when the client left before an answer began."""
        seconds = time.time() - self.arrival
        shown: dict[str, Any] = {
            "time": utc(self.arrival),
            "request_id": self.request_id,
            "key": self.caller.id or None,
            "method": self.method,
            "route": self.path,
            "model": self.model or None,
            "status": status,
            "outcome": self.outcome_of(status),
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "seconds": round(seconds, 3),
        }
        if self.keeps_contents:
            shown |= {"request": self.request, "answers": [self.answers[i] for i in sorted(self.answers)]}
        return shown

    def outcome_of(self, status: int | None) -> str:
        if self.outcome:
            return self.outcome
        if status is None:
            return "abort"
        return "ok" if status < 400 else "error"
