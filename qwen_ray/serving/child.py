"""A process that another one starts, hears and ends: settings in, events out, and no longer than its parent.

    python -m MODULE [ARGUMENT ...]        settings (JSON, one line) on stdin; events (JSON lines) on stdout

Whoever started it keeps stdin open: its end, like SIGTERM, means stop. Events are `{"event": NAME, ...}`; `error` has
`message` and `exit_code`. A process of its own, so that Ray's settings can be made before Ray is imported, and so that
whoever started it can end everything whatever state this one is in.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from ray.exceptions import RayTaskError

from qwen_ray.config import Settings
from qwen_ray.core.errors import QwenRayError
from qwen_ray.core.logs import handler

logger = logging.getLogger(__name__)


def supervised(name: str, work: Callable[[Settings], None], end: Callable[[Settings], None]) -> NoReturn:
    """`work`, until it is done, fails or is told to stop; then `end`, and the process is over."""
    settings = Settings.from_dict(json.loads(sys.stdin.readline()))
    logs = settings.observability.logs
    logging.basicConfig(level=logs.level.upper(), handlers=[handler(name, logs.format)])
    threading.Thread(target=_stop_with_stdin, daemon=True).start()
    stop_with_sigterm()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_code = 0
    try:
        work(settings)
    except QwenRayError as error:
        exit_code = error.exit_code
        tell("error", message=str(error), exit_code=exit_code)
    except Exception as error:
        logger.exception("the %s failed", name)
        exit_code = 1
        cause = error.cause if isinstance(error, RayTaskError) else error
        tell("error", message=f"{type(cause).__name__}: {cause}", exit_code=exit_code)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end(settings)
    sys.exit(exit_code)


def stop_with_sigterm() -> None:
    """Once more after Ray has been started: it puts its own handler in place of ours."""
    signal.signal(signal.SIGTERM, _stop)


def tell(event: str, **details: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **details}) + "\n")
    sys.stdout.flush()


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _stop_with_stdin() -> None:
    # Not through Python's buffer, whose lock this thread would still hold when the interpreter ends.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
