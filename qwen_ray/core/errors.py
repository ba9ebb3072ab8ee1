"""Every error that qwen-ray raises on purpose, as one tree.

    QwenRayError
    ├── RequestError            somebody's request; `status` is its HTTP status
    │   ├── InvalidRequest      400  a field is wrong: `param` names it
    │   │   └── ContextLengthExceeded   prompt (+ max_tokens) does not fit the model
    │   ├── Unauthorized        401  no key, or none that is known
    │   ├── RequestTooLarge     413  the body, or a list in it, is over its limit
    │   │   └── HeadersTooLarge 431
    │   ├── UnknownModel        404  no such model is served here
    │   ├── Overloaded          429  queues are full; `retry_after` says when to come back
    │   │   └── RateLimited     429  a key has used its requests or tokens of this minute
    │   ├── NotReady            503  no replica can take requests yet
    │   ├── DeadlineExceeded    408  the time it gave itself was up before its first token
    │   └── RequestFailed       500  the engine or a rank failed while running it
    ├── SettingsError           exit 2  a settings key is wrong: `field` names it
    ├── SourceError             exit 3  a model's files could not be found or fetched
    ├── CheckpointError         exit 4  a model's files are there but wrong
    ├── PlanRefused             exit 5  it cannot fit: `inequality` shows the numbers
    └── RankFailed              a rank died or stopped making progress; the group repairs it

HTTP bodies are made from these in `serving/errors.py`, exit codes in `cli.py`, and nowhere else.
"""

from __future__ import annotations

from typing import Any, ClassVar

DEADLINE_EXCEEDED = "deadline_exceeded"
RANKS_FAILED = "ranks_failed"  # ranks died while they ran this one request and nothing else


class QwenRayError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with. All of them cross processes whole."""

    exit_code: ClassVar[int] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle would call the constructor with the message alone, which not all of them accept.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[QwenRayError], args: tuple[Any, ...], state: dict[str, Any]) -> QwenRayError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class RequestError(QwenRayError):
    """A request that cannot be answered.

    `param` is the request field at fault (None when no single one is), `code` a stable machine-readable word.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    status = 400
    kind = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    def __init__(self, message: str, *, param: str = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class RequestTooLarge(RequestError):
    status = 413
    kind = "invalid_request_error"


class HeadersTooLarge(RequestTooLarge):
    status = 431


class Unauthorized(RequestError):
    """The same for no key and for a wrong one: the answer tells nothing."""

    status = 401
    kind = "invalid_request_error"

    def __init__(self) -> None:
        super().__init__("Send a valid API key in the header `Authorization: Bearer KEY`.", code="invalid_api_key")


class UnknownModel(RequestError):
    status = 404
    kind = "invalid_request_error"

    def __init__(self, name: str, served: list[str]) -> None:
        super().__init__(
            f"The model `{name}` does not exist here; served: {', '.join(served) or 'none'}.",
            param="model",
            code="model_not_found",
        )


class Overloaded(RequestError):
    status = 429
    kind = "overloaded_error"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after = retry_after


class RateLimited(Overloaded):
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.code = "rate_limit_exceeded"


class NotReady(RequestError):
    status = 503
    kind = "unavailable_error"


class DeadlineExceeded(RequestError):
    """Its own time, not the server's: no 5xx, which would be an alarm."""

    status = 408
    kind = "timeout_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code=DEADLINE_EXCEEDED)


class RequestFailed(RequestError):
    status = 500
    kind = "internal_error"


class SettingsError(QwenRayError):
    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class SourceError(QwenRayError):
    exit_code = 3


class CheckpointError(QwenRayError):
    exit_code = 4


class PlanRefused(QwenRayError):
    """A plan that cannot hold; `inequality` is the comparison that failed, with its numbers."""

    exit_code = 5

    def __init__(self, message: str, *, inequality: str | None = None) -> None:
        super().__init__(message)
        self.inequality = inequality


class RankFailed(QwenRayError):
    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed: {reason}")
        self.rank = rank
        self.reason = reason
