"""What a check has found, and how checks are kept apart: one that breaks or hangs is a finding, others go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`advice` says what to do, in one line; empty where there is nothing to do. `node`: its address, "" for all."""

    check: str
    verdict: Verdict
    message: str
    advice: str = ""
    node: str = ""


def guarded(check: str, seconds: float, work: Callable[[], list[Finding]]) -> list[Finding]:
    """What `work` finds, or that it raised, or that it took longer than `seconds`; it is then left alone."""
    found: list[Finding] = []
    done = threading.Event()

    def run() -> None:
        try:
            found.extend(work())
        except Exception as error:
            found.append(_broken(check, f"{type(error).__name__}: {error}"))
        done.set()

    threading.Thread(target=run, name=f"doctor-{check}", daemon=True).start()
    if not done.wait(seconds):
        return [_broken(check, f"no answer within {seconds:.0f} s")]
    return found


def _broken(check: str, why: str) -> Finding:
    message = f"this check did not come to an end: {' '.join(why.split())[:300]}"
    return Finding(check=check, verdict="fail", message=message, advice="See to this first, then ask again.")
